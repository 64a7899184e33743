"""A seed of 32 bits gives the noise away; a key stream does not."""

import pytest

from benchmarks.privacy_attacks.noise_seed import attack

pytestmark = pytest.mark.full_size


def test_noise_is_subtracted_where_its_seed_can_be_tried_and_not_otherwise():
    assert attack(3, False, 0).correct == 3
    guarded = attack(6, True, 0)
    assert guarded.correct < 6 and guarded.epsilon < 0.1
