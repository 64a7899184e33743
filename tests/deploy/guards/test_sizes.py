"""Declared sizes are added up before anything is put together."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from deploy.guards.sizes import OversizedMessageError, check_sizes

ROOT = Path(__file__).resolve().parents[3]
LIMIT = 1_000_000


def pieces(array: Array) -> dict[str, bytes]:
    record = RecordDict({"arrays": ArrayRecord({"update": array}), "header": ConfigRecord({"json": "{}"})})
    return {name: each.deflate() for name, each in get_all_nested_objects(record).items()}


def bomb(repetitions: object, shape: object = (25,)) -> dict[str, bytes]:
    """One chunk of 100 bytes that an array lists many times."""
    chunk = b"ArrayChunk  100\0" + bytes(100)
    body = json.dumps({"dtype": "float32", "shape": shape, "stype": "numpy.ndarray", "arraychunk_ids": repetitions})
    return {"c": chunk, "a": f"Array c {len(body)}\0{body}".encode()}


def test_honest_arrays_have_their_size_also_when_chunks_are_alike():
    array = Array(np.arange(1000, dtype=np.float32))
    assert 4000 < check_sizes(pieces(array), LIMIT) < 4200
    zeros = Array(np.zeros(3 * 5 * 2**18, np.float32))  # chunks of 5 MiB, all but the first and last with one content
    assert 15 * 2**20 < check_sizes(pieces(zeros), 16 * 2**20) < 15 * 2**20 + 300


def test_a_chunk_that_is_listed_many_times_counts_as_often():
    assert check_sizes(bomb([0] * 50), LIMIT) == 50 * 116
    with pytest.raises(OversizedMessageError, match="add up to"):
        check_sizes(bomb([0] * 10_000), LIMIT)


def test_many_arrays_count_together():
    several = {**bomb([0] * 5000), **{str(number): bomb([0] * 5000)["a"] for number in range(3)}}
    with pytest.raises(OversizedMessageError):
        check_sizes(several, LIMIT)


@pytest.mark.parametrize("shape", [(10**9,), (10**6, 10**6), (2,) * 9, (-1,), (1.5,), ("9",), (10**30,), "x", None])
def test_a_shape_beyond_the_limit_or_no_shape_is_refused(shape: object):
    with pytest.raises(OversizedMessageError):
        check_sizes(bomb([0], shape), LIMIT)


@pytest.mark.parametrize("chunks", [[1], [-1], [0.0], [True], ["0"], {"0": 1}, None, [[0]]])
def test_chunks_that_are_none_of_the_arrays_are_refused(chunks: object):
    with pytest.raises(OversizedMessageError):
        check_sizes(bomb(chunks), LIMIT)


@pytest.mark.parametrize(
    "content",
    [b"", b"\0", b"Array c\0{}", b"Array c 2 3\0{}", b"Array c 3\0[[[", b"Array c 9\0" + b"[" * 100_000,
     b"Array c 9\0" + b'{"shape": [' + b"9" * 5000 + b"]}", b"ConfigRecord  9\0" + bytes(2**20)],
)  # fmt: skip
def test_a_malformed_or_swollen_object_is_one_typed_error(content: bytes):
    with pytest.raises(OversizedMessageError):
        check_sizes({"x": content}, LIMIT)


@pytest.mark.parametrize("first", ["", "import flwr.superlink.grid.http_grid"])
def test_whoever_puts_messages_together_is_guarded_whenever_it_was_loaded(first: str):
    code = f"""
import sys
{first}
from deploy.guards.sizes import OversizedMessageError, check_before_inflating
check_before_inflating()
assert ("flwr.superlink" in sys.modules) == bool({first!r})
import flwr.superlink.grid.http_grid as grid
import flwr.supercore.inflatable.inflatable_utils as utils
for module in (grid, utils):
    try:
        module.inflate_object_from_contents("a", {{"a": b""}})
    except OversizedMessageError:
        continue
    sys.exit(1)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=ROOT)
