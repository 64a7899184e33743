"""The sizing table in the docs is the one that is computed, and its memory is not less than what a step keeps."""

import re

import pytest

from benchmarks.sizing import BEGIN, DOCUMENT, END, SHAPES, bytes_kept, experiment, stored_rates, table

pytestmark = pytest.mark.full_size
_PLACE = re.compile(r"^\| (\w) \| (\d+) \(patch (\d+)\)")


def test_the_table_in_the_docs_is_todays():
    stands = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    rows = stands.strip().splitlines()
    head, rule, *computed = table(SHAPES[:1])
    assert rows[:3] == [head, rule, *computed], "python -m benchmarks.sizing --write"
    told = [
        tuple(int(number) if number.isdigit() else number for number in _PLACE.search(row).groups()) for row in rows[2:]
    ]
    assert told == list(SHAPES)


def test_rates_are_read_from_the_stored_row():
    plain, private = stored_rates()
    assert plain > private > 0


@pytest.mark.parametrize("pixels", [16, 32])
def test_kept_bytes_are_those_of_a_real_step_and_a_little_more(pixels: int):
    counted, real = (bytes_kept(experiment("T", pixels, 4), device) for device in ("meta", "cpu"))
    assert real <= counted <= 1.5 * real
