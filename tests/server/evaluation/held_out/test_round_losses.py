import numpy as np
import pytest
import torch

from server.evaluation.held_out import round_losses
from server.evaluation.held_out.round_losses import HeldOut
from shared.data.image_set import ImageCache, synthetic_images
from shared.diffusion.schedule import make_schedule
from shared.diffusion.uvit import build_model
from shared.experiment.config import Experiment


def experiment(**sections):
    return Experiment.model_validate({"model": {"image_size": 8, "patch_size": 4}} | sections)


def cache(num_images, persons=None, names=()):
    images = np.random.default_rng(5).integers(0, 256, (num_images, 3, 8, 8)).astype(np.uint8)
    return ImageCache(lambda: images, num_images, 8, persons=persons, names=names)


def test_losses_of_a_network_that_predicts_nothing_are_those_of_the_noise_and_weigh_ranges_alike():
    """eps-prediction of 0: the loss is the mean square of the noise that was drawn, whatever the images."""
    held_out = HeldOut(experiment(), cache(50))
    found = held_out.losses(lambda tokens, _t, _ids: torch.zeros_like(tokens))
    squares = [float(draw.eps_BVP.double().square().mean()) for draw in held_out._draws]
    assert list(found) == ["t 0-332", "t 333-665", "t 666-999", "all"]
    assert list(found.values())[:3] == pytest.approx(squares)
    assert found["all"] == pytest.approx(np.mean(squares))
    assert len(set(squares)) == 3


def test_every_time_step_of_a_group_lies_in_its_range():
    held_out = HeldOut(experiment(diffusion={"timesteps": 30}, evaluation={"steps": 5}), cache(256))
    for (first, last), draw in zip(held_out.ranges, held_out._draws, strict=True):
        assert (int(draw.t_B.min()), int(draw.t_B.max())) == (first, last - 1)
    assert [first for first, _ in held_out.ranges] == [0, 10, 20]


def test_a_network_that_knows_the_noise_has_no_loss_and_damage_to_one_range_shows_there():
    kind = experiment()
    images = cache(40)
    held_out = HeldOut(kind, images)
    schedule = make_schedule("cosine", 1000)

    def guess_black(tokens, t_B, _ids):
        """eps if every pixel were 0 in the network's range: exact for such images only."""
        return tokens / schedule.noise[t_B].float()[:, None, None]

    grey = np.full((40, 3, 8, 8), 127, np.uint8)
    exact = HeldOut(kind, ImageCache(lambda: grey, 40, 8)).losses(guess_black)
    assert exact["t 666-999"] < 1e-2
    assert held_out.losses(guess_black)["t 0-332"] > 20 * held_out.losses(guess_black)["t 666-999"]


def test_two_looks_at_the_same_weights_are_equal_bit_by_bit():
    kind = experiment()
    model = build_model(kind).eval()
    first, second = (HeldOut(kind, synthetic_images("synthetic:public:20", 8)).losses(model) for _ in range(2))
    assert first == second


def test_folders_are_labels_where_they_are_few_and_large_and_their_loss_is_that_of_their_images(monkeypatch):
    monkeypatch.setattr(round_losses, "LEAST_LABELLED", 10)
    codes = np.array([0] * 30 + [1] * 12 + [2] * 5)
    names = tuple(f"{'abc'[code]}/{number}.png" for number, code in enumerate(codes))
    held_out = HeldOut(experiment(), cache(47, codes, names))
    found = held_out.losses(lambda tokens, _t, _ids: torch.zeros_like(tokens))
    assert set(found) - {"all"} == {"t 0-332", "t 333-665", "t 666-999", "label a", "label b"}
    rows = held_out.groups["label b"]
    own = [draw.eps_BVP[rows].double().square().mean() for draw in held_out._draws]
    assert len(rows) == 12 and found["label b"] == pytest.approx(float(np.mean(own)))


def test_persons_are_no_labels():
    assert set(HeldOut(experiment(), cache(40, np.arange(40))).groups) == {"all"}


def test_a_label_without_a_folder_keeps_its_number(monkeypatch):
    monkeypatch.setattr(round_losses, "LEAST_LABELLED", 3)
    assert "label 7" in HeldOut(experiment(), cache(8, np.array([7] * 4 + [9] * 4))).groups


def test_of_many_images_a_fixed_draw_is_looked_at(monkeypatch):
    monkeypatch.setattr(round_losses, "MAX_IMAGES", 16)
    first, second = HeldOut(experiment(), cache(90)), HeldOut(experiment(), cache(90))
    assert len(first.images_NCHW) == 16 and torch.equal(first.images_NCHW, second.images_NCHW)
