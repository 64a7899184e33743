"""Each attack works when its guard is off, and stays below what epsilon allows when it is on."""

import pytest

from benchmarks.privacy_attacks.client_level import ATTACKS

TRIALS = 100


@pytest.mark.parametrize("name", list(ATTACKS))
def test_the_guard_holds(name):
    outcome = ATTACKS[name](TRIALS, True, 0)
    assert outcome.trials == TRIALS
    assert outcome.is_held


@pytest.mark.parametrize("name", list(ATTACKS))
def test_without_its_guard_the_attack_breaks_the_promise(name):
    assert not ATTACKS[name](TRIALS, False, 0).is_held
