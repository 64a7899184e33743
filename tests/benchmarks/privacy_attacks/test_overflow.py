"""With the guard off a face that overflows is found; with it on, it is not, and the round is trained all the same."""

import pytest

from benchmarks.privacy_attacks import detector, overflow
from benchmarks.privacy_attacks.overflow import ATTACKS
from tests.small_network import SMALL

TRIALS, SEED = 2, 0
"""The coins of this seed fall on both sides."""


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_works_without_its_guard_and_not_with_it(name, monkeypatch):
    for module in (detector, overflow):
        monkeypatch.setattr(module, "WIDTH", SMALL["width"])
    assert ATTACKS[name](TRIALS, False, SEED).correct == TRIALS
    guarded = ATTACKS[name](TRIALS, True, SEED)
    assert guarded.correct < TRIALS and guarded.epsilon < 0.1
