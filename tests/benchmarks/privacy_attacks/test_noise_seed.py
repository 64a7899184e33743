"""A seed of 32 bits gives the noise away; a key stream does not."""

from benchmarks.privacy_attacks.noise_seed import attack

TRIALS = 8


def test_noise_is_subtracted_where_its_seed_can_be_tried_and_not_otherwise():
    assert attack(TRIALS, False, 0).correct == TRIALS
    assert attack(TRIALS, True, 0).correct < TRIALS
