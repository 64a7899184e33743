"""What a sampled unit gives to a step."""

import torch

from client.data.units import load_units
from tests.client.conftest import SIZE
from tests.client.privacy.test_dp_sgd import CPU, Photos, plan, units_of


def test_draws_of_a_person_take_different_images_of_that_person():
    settings = plan(unit="person", draws=3)
    batch = load_units(Photos(8), units_of(4, 1, 3), settings, torch.Generator().manual_seed(0), CPU)
    assert batch.shape == (3, 3, 3, SIZE, SIZE)
    numbers = batch[:, :, 0, 0, 0]
    assert set(numbers[0].tolist()) < {0, 1, 2, 3}
    assert len(set(numbers[0].tolist())) == 3
    assert numbers[1].tolist() == [4, 4, 4]
    assert sorted(numbers[2].tolist()) == [5, 6, 7]


def test_draws_of_an_image_share_it():
    batch = load_units(Photos(8), units_of(1, 1), plan(draws=3), torch.Generator(), CPU)
    assert batch.shape == (2, 3, SIZE, SIZE)
