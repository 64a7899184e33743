"""With the guard off a face that overflows is found; with it on, it is not."""

import pytest

from benchmarks.privacy_attacks.overflow import ATTACKS

pytestmark = pytest.mark.full_size

TRIALS = 4


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_works_without_its_guard_and_not_with_it(name):
    assert ATTACKS[name](TRIALS, False, 0).correct == TRIALS
    guarded = ATTACKS[name](TRIALS, True, 0)
    assert guarded.correct < TRIALS and guarded.epsilon < 0.1
