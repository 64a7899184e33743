"""A seed of 32 bits gives the noise away; a key stream does not."""

import pytest
import torch

from benchmarks.privacy_attacks.noise_seed import SIGNS, attack, core_hours, noise_of

pytestmark = pytest.mark.full_size


def test_noise_is_subtracted_where_its_seed_can_be_tried_and_not_otherwise():
    assert attack(3, False, 0).correct == 3
    guarded = attack(6, True, 0)
    assert guarded.correct < 6 and guarded.epsilon < 0.1


def test_a_candidate_seed_is_judged_by_its_first_values_and_all_cost_in_proportion():
    assert torch.equal(noise_of(SIGNS, 5), noise_of(768, 5)[:SIGNS])
    assert 0 < core_hours(2**16) < core_hours(2**40)
