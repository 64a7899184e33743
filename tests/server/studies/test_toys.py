import json

import pytest
import torch

from server.studies import toys
from server.studies.toys import CoordinateMlp, rose, run_toy, sliced_wasserstein, swiss_roll
from shared.seeding import generator

SHORT = {"pretrain_steps": 80, "finetune_steps": 20, "num_samples": 300}


@pytest.mark.parametrize("name", ["swiss-roll", "rose"])
def test_the_pretrained_start_beats_scratch_at_equal_fine_tuning_steps(name, tmp_path, monkeypatch):
    monkeypatch.setattr(toys, "_SAMPLING_STEPS", 20)
    monkeypatch.setattr(toys, "_BATCH_POINTS", 128)
    result = run_toy(name, tmp_path, **SHORT)
    assert result.distance_finetuned < result.distance_scratch
    assert result.distance_floor < result.distance_finetuned
    assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((tmp_path / f"{name}.json").read_text()) == vars(result)


def test_a_toy_repeats_with_its_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(toys, "_SAMPLING_STEPS", 5)
    monkeypatch.setattr(toys, "_BATCH_POINTS", 64)
    monkeypatch.setattr(toys, "_plot", lambda *_: None)
    tiny = {"pretrain_steps": 3, "finetune_steps": 2, "num_samples": 50}
    first, second, other = (run_toy("swiss-roll", tmp_path, seed=seed, **tiny) for seed in (1, 1, 2))
    assert first.distance_finetuned == second.distance_finetuned
    assert first.distance_finetuned != other.distance_finetuned


@pytest.mark.parametrize("shape", [swiss_roll, rose])
def test_points_fill_the_range_that_the_noise_is_made_for(shape):
    points = shape(20_000, generator(0))
    assert points.abs().max() < 1.05
    assert (points.std(0) > 0.2).all()


def test_swiss_roll_is_a_spiral():
    points = swiss_roll(5000, generator(0)) * 4.8 * torch.pi
    radius, angle = points.norm(dim=1), torch.atan2(points[:, 1], points[:, 0])
    turns = (radius - angle) / (2 * torch.pi)
    assert (turns - turns.round()).abs().quantile(0.99) < 0.1


def test_a_network_before_fine_tuning_treats_coordinates_as_independent():
    torch.manual_seed(0)
    model, t, ids = CoordinateMlp(2), torch.tensor([500]), torch.tensor([[0, 1]])
    first = model(torch.tensor([[[0.3], [0.5]]]), t, ids)
    other = model(torch.tensor([[[0.3], [-0.9]]]), t, ids)
    assert first[0, 0] == other[0, 0]
    assert first[0, 1] != other[0, 1]


def test_sliced_wasserstein_in_one_dimension_is_the_exact_distance():
    x, y = torch.randn(500, 1), torch.randn(500, 1) * 2 + 1
    exact = (x.sort(0).values - y.sort(0).values).square().mean().sqrt()
    assert abs(sliced_wasserstein(x, y) - exact) < 1e-6


def test_sliced_wasserstein_of_a_shift_is_its_length_over_the_root_of_the_dimension():
    x = torch.randn(500, 3)
    assert sliced_wasserstein(x, x) == 0
    assert abs(sliced_wasserstein(x, x + torch.tensor([3.0, 0, 0]), 4000) - 3 / 3**0.5) < 0.05
