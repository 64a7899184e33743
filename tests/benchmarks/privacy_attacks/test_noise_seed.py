"""A seed of 32 bits gives the noise away; a key stream does not."""

import numpy as np
import torch

from benchmarks.privacy_attacks import detector
from benchmarks.privacy_attacks.noise_seed import ALL, SIGNS, attack, first_signs, noise_of
from tests.small_network import SMALL

WINDOW = 2**15
"""Seeds tried in a trial: the benchmark tries eight times as many."""


def test_noise_is_subtracted_where_its_seed_can_be_tried_and_not_otherwise(monkeypatch):
    monkeypatch.setattr(detector, "WIDTH", SMALL["width"])
    found = attack(3, False, 0, WINDOW)
    assert found.correct == 3 and str(WINDOW) in found.remark
    guarded = attack(3, True, 0, WINDOW)
    assert guarded.correct < 3 and guarded.epsilon < 0.1


def test_signs_of_a_candidate_are_those_of_torchs_generator():
    seeds = [0, 1, 5489, 2**31, ALL - 1, *np.random.default_rng(0).integers(ALL, size=40).tolist()]
    expected = torch.stack([noise_of(768, seed)[:SIGNS] > 0 for seed in seeds], 1)
    assert np.array_equal(first_signs(np.array(seeds, np.uint32)), expected.numpy())


def test_torchs_generator_keeps_32_bits_of_a_seed():
    assert torch.equal(noise_of(20, 7), noise_of(20, 7 + 5 * ALL))
    assert not torch.equal(noise_of(20, 7), noise_of(20, 8))
