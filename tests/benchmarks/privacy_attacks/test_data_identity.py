"""Every attack succeeds with its guard off, and never with it on."""

import pytest

from benchmarks.privacy_attacks.data_identity import ATTACKS


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_fails_at_a_guarded_site(name: str):
    outcome = ATTACKS[name](2, True, 1)
    assert (outcome.name, outcome.trials, outcome.correct) == (name, 2, 0)


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_succeeds_with_the_guard_off(name: str):
    outcome = ATTACKS[name](2, False, 1)
    assert outcome.correct == 2
