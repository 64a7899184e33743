"""What a sampled unit gives to a step."""

import torch

from client.data.units import choose_images, read_images
from tests.client.conftest import SIZE
from tests.client.privacy.test_dp_sgd import Photos, plan, units_of


def test_draws_of_a_person_take_different_images_of_that_person():
    settings = plan(unit="person", draws=3)
    shown = choose_images(units_of(4, 1, 3), settings, torch.Generator().manual_seed(0))
    batch = read_images(Photos(8), shown, 3)
    assert batch.shape == (3, 3, 3, SIZE, SIZE)
    numbers = batch[:, :, 0, 0, 0]
    assert set(numbers[0].tolist()) < {0, 1, 2, 3}
    assert len(set(numbers[0].tolist())) == 3
    assert numbers[1].tolist() == [4, 4, 4]
    assert sorted(numbers[2].tolist()) == [5, 6, 7]


def test_every_order_of_a_persons_images_comes_and_a_round_is_over_before_an_image_comes_again():
    settings = plan(unit="person", draws=4)
    rows = choose_images(units_of(*[3] * 300), settings, torch.Generator().manual_seed(0)).ids_BK
    orders = [tuple(row - 3 * number) for number, row in enumerate(rows)]
    assert all(sorted(order[:3]) == [0, 1, 2] for order in orders)
    # Six orders, and one of three begins again: each of 18 is expected 17 times, and missing with probability 2e-7.
    assert len(set(orders)) == 18


def test_a_step_without_units_shows_nothing():
    shown = choose_images([], plan(unit="person", draws=3), torch.Generator())
    assert shown.ids_BK.shape == shown.is_flipped_BK.shape == (0, 3)


def test_draws_of_an_image_share_it():
    photos = Photos(8)
    batch = read_images(photos, choose_images(units_of(1, 1), plan(draws=3), torch.Generator()), 3)
    assert batch.shape == (2, 3, 3, SIZE, SIZE)
    assert photos.asked[0].tolist() == [0, 1]
    assert torch.equal(batch[:, 0], batch[:, 2])


def test_half_of_the_images_are_mirrored_unless_the_experiment_says_no():
    ramp = torch.arange(SIZE, dtype=torch.uint8).expand(3, SIZE, SIZE)

    class Ramps:
        def batch(self, ids):
            return ramp.expand(len(ids), -1, -1, -1)

    shown = choose_images(units_of(*[1] * 400), plan(), torch.Generator().manual_seed(1))
    batch = read_images(Ramps(), shown, 1)
    is_mirrored = batch[:, 0, 0, 0, 0] == SIZE - 1
    assert 150 < int(is_mirrored.sum()) < 250
    assert torch.equal(is_mirrored, shown.is_flipped_BK[:, 0])
    still = plan().model_copy(update={"data": plan().data.model_copy(update={"horizontal_flip": False})})
    assert not choose_images(units_of(1, 1, 1), still, torch.Generator()).is_flipped_BK.any()


def test_unit_can_be_read_alone_as_it_is_shown_among_others():
    settings = plan(unit="person", draws=2)
    shown = choose_images(units_of(4, 2, 3), settings, torch.Generator().manual_seed(3))
    whole = read_images(Photos(9), shown, 2)
    for number in range(3):
        assert torch.equal(read_images(Photos(9), shown.unit(number), 2)[0], whole[number])
