"""The masked sum of a round: its bytes do not grow with the sites, and on disk it is whole or not there."""

import numpy as np
import pytest

from server.federation.secure.masked_sum import ROUND_FILE, SUM_FILE, KeptRound, KeptSum, MaskedSum
from server.federation.updates.aggregation import UpdateError
from shared.secure_aggregation.dealing import deal
from shared.secure_aggregation.ring import Ring
from tests.shared.secure_aggregation.parties import parties

DIGEST, OTHER = "ab" * 32, "cd" * 32
SITES = parties(3)
DEALINGS = {alias: deal(SITES.of(alias), bytes(32)) for alias in SITES.roster.aliases}


def total(bits=64):
    return MaskedSum(Ring(bits, 25, 4.0), SITES.roster, 5)


@pytest.mark.parametrize("bits", [64, 32])
def test_updates_are_added_modulo_the_ring_in_place(bits):
    made = total(bits)
    before = made.elements
    high = np.full(5, 2**bits - 1, made.ring.dtype)
    for alias in SITES.roster.aliases:
        made.fold(alias, high, DEALINGS[alias])
    assert made.elements is before
    assert made.elements.tolist() == [2**bits - 3] * 5
    assert list(made.dealings) == list(SITES.roster.aliases)


@pytest.mark.parametrize(
    ("update", "dealing", "code"),
    [
        (np.zeros(5, np.uint32), DEALINGS["site-00"], "dtype"),
        (np.zeros(5, np.float64), DEALINGS["site-00"], "dtype"),
        (np.zeros(6, np.uint64), DEALINGS["site-00"], "length"),
        (np.zeros(5, np.uint64), None, "dealing"),
        (np.zeros(5, np.uint64), deal(parties(4).of("site-00"), bytes(32)), "dealing"),
    ],
)
def test_what_has_another_form_leaves_the_sum_alone(update, dealing, code):
    made = total()
    with pytest.raises(UpdateError) as caught:
        made.fold("site-00", update, dealing)
    assert caught.value.code == code
    assert not made.elements.any() and not made.dealings


def test_a_kept_round_is_found_by_its_request_only_and_not_when_a_file_is_damaged(tmp_path):
    kept = KeptSum(tmp_path / "secure")
    assert kept.find(DIGEST, total()) is None
    outcomes = [{"site": "site-00", "state": "answered"}]
    round_ = KeptRound(np.arange(5, dtype=np.uint64), DEALINGS, outcomes, 17)
    kept.keep(DIGEST, round_)
    found = KeptSum(tmp_path / "secure").find(DIGEST, total())
    assert found is not None and found.elements.tolist() == [0, 1, 2, 3, 4]
    assert (found.dealings, found.outcomes, found.bytes_received) == (DEALINGS, outcomes, 17)
    assert (tmp_path / "secure").stat().st_mode & 0o777 == 0o700
    assert kept.find(OTHER, total()) is None
    assert kept.find(DIGEST, total(32)) is None
    for name in (ROUND_FILE, SUM_FILE.format(DIGEST)):
        whole = (tmp_path / "secure" / name).read_bytes()
        (tmp_path / "secure" / name).write_bytes(whole[:-9])
        assert kept.find(DIGEST, total()) is None
        (tmp_path / "secure" / name).write_bytes(whole)
    kept.clear()
    assert list((tmp_path / "secure").iterdir()) == []
    assert kept.find(DIGEST, total()) is None
