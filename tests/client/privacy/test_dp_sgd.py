"""DP-SGD steps: what a round adds up, divides by and noises."""

import itertools
import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.privacy import dp_sgd
from client.privacy.dp_sgd import PrivateStep, train_private
from client.privacy.randomness.secret_random import secret_streams
from shared.diffusion.losses import Draw, per_unit_loss
from shared.diffusion.uvit import build_model
from shared.experiment.config import Experiment
from tests.client.conftest import DP, SIZE, experiment

CPU = torch.device("cpu")
SPREADS = 7
"""Standard deviations that a random figure may lie off: 2.6e-12 of them lie further."""


def assert_noise(x: Tensor, deviation: float) -> None:
    """Mean and deviation of normal numbers."""
    assert abs(float(x.mean())) < SPREADS * deviation / math.sqrt(len(x))
    assert float(x.std()) == pytest.approx(deviation, rel=SPREADS / math.sqrt(2 * len(x)))


class Photos:
    """Images whose pixels are all their own number."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.asked: list[NDArray[np.int64]] = []

    def batch(self, ids: NDArray[np.int64]) -> Tensor:
        self.asked.append(ids)
        return torch.as_tensor(ids, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, SIZE, SIZE).clone()


def units_of(*sizes: int) -> list[NDArray[np.int64]]:
    borders = np.cumsum([0, *sizes])
    return [np.arange(a, b) for a, b in itertools.pairwise(borders)]


def plan(steps: int = 2, **changed: object) -> Experiment:
    return experiment(privacy={**DP, **changed}, federation={"local_steps": steps}, optim={"lr": 1e-3})


def noised_gradients(settings: Experiment, photos: int) -> list[Tensor]:
    """The gradients that the optimizer sees, by step."""
    torch.manual_seed(0)
    model = build_model(settings)
    seen: list[Tensor] = []
    train_private(
        model,
        settings,
        Photos(photos),
        units_of(*[1] * photos),
        device=CPU,
        after_noise=lambda: seen.append(torch.cat([p.grad.flatten() for p in model.parameters()])),
    )
    return seen


@pytest.mark.parametrize("clipping", ["fast", "hooks"])
def test_empty_batches_step_and_add_the_whole_noise(clipping: str):
    settings = plan(3, sample_rate=1e-9, noise_multiplier=2.0, max_grad_norm=0.5, expected_batch=8, clipping=clipping)
    gradients = noised_gradients(settings, 5)
    assert len(gradients) == 3
    for gradient in gradients:
        assert_noise(gradient, 2.0 * 0.5 / 8)


def test_noise_differs_between_rounds_although_the_seed_is_set():
    settings = plan(1, sample_rate=1e-9)
    first, second = noised_gradients(settings, 3)[0], noised_gradients(settings, 3)[0]
    assert not torch.equal(first, second)
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < SPREADS / math.sqrt(len(first))


@pytest.mark.parametrize("clipping", ["fast", "hooks"])
def test_gradient_sum_is_bounded_and_divided_by_the_public_normaliser(clipping: str):
    settings = plan(1, sample_rate=1.0, noise_multiplier=1e-9, max_grad_norm=1e-3, expected_batch=2, clipping=clipping)
    (gradient,) = noised_gradients(settings, 6)
    assert 0 < float(gradient.norm()) <= 6 * 1e-3 / 2


def pin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take all randomness out that depends on how units are split over micro-batches: one time step, no flip."""
    monkeypatch.setattr(dp_sgd, "draw_noise", fixed_draw)


def fixed_draw(settings: Experiment, batch: int, _: object) -> Draw:
    patches = settings.grid_size**2
    values = settings.model.patch_size**2 * 3
    eps = torch.linspace(-1, 1, patches * values).view(1, patches, values).expand(batch, -1, -1)
    return Draw(torch.full((batch,), 7), eps, torch.arange(patches).expand(batch, -1))


def test_micro_batches_sum_to_the_whole_batch(monkeypatch: pytest.MonkeyPatch):
    pin(monkeypatch)
    fixed = {"sample_rate": 1.0, "noise_multiplier": 1e-9, "max_grad_norm": 1e-3, "expected_batch": 24}
    whole = noised_gradients(plan(1, micro_batch=6, **fixed), 6)[0]
    parts = noised_gradients(plan(1, micro_batch=4, **fixed), 6)[0]
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-10)


def test_hooks_and_fast_clipping_agree(monkeypatch: pytest.MonkeyPatch):
    pin(monkeypatch)
    fixed = {"sample_rate": 1.0, "noise_multiplier": 1e-9, "max_grad_norm": 1e-2}
    fast, hooks = (noised_gradients(plan(1, clipping=each, **fixed), 4)[0] for each in ("fast", "hooks"))
    torch.testing.assert_close(fast, hooks, rtol=1e-4, atol=1e-8)


def test_released_mean_is_a_multiple_of_the_grid_and_its_noise_has_the_planned_deviation():
    settings = plan(1, sample_rate=1.0, noise_multiplier=2.0, max_grad_norm=1.0, expected_batch=1)
    step = PrivateStep(build_model(settings), settings, CPU, "float32")
    step.rehearse()
    seen: list[Tensor] = []
    step.total.zero_ = lambda: seen.append(step.total.clone())  # type: ignore[method-assign]
    step.take(Photos(3), units_of(1, 1, 1), secret_streams())
    (total,) = seen
    assert torch.equal(total, total.round()) and step.grid == 2.0**-30
    # Three units are at most 3 C long, and the noise 2 C on each of many thousand numbers.
    assert float(total.std()) * step.grid == pytest.approx(2.0, rel=SPREADS / math.sqrt(len(total)))


@pytest.mark.parametrize("clipping", ["fast", "hooks"])
def test_micro_batches_have_one_shape_from_before_the_first_image_is_read(clipping: str):
    settings, photos, shapes = plan(2, sample_rate=0.5, clipping=clipping, expected_batch=8), Photos(7), []

    def loss(model, schedule, experiment, images, *draw):
        shapes.append((len(photos.asked), images.shape))
        return per_unit_loss(model, schedule, experiment, images, *draw)

    train_private(build_model(settings), settings, photos, units_of(*[1] * 7), device=CPU, loss=loss)
    assert shapes[0] == (0, (2, 1, 3, SIZE, SIZE))
    assert len({shape for _, shape in shapes}) == 1


def test_no_stream_of_any_step_has_the_key_of_another(monkeypatch: pytest.MonkeyPatch):
    keys: list[bytes] = []
    for name in ("SecretRandom", "Keystream"):
        made = getattr(dp_sgd, name)
        monkeypatch.setattr(dp_sgd, name, lambda key, *rest, made=made: (keys.append(key), made(key, *rest))[1])
    noised_gradients(plan(2), 6)
    # Units, images, draws and noise of two steps: equal keys would add noise that the coordinator can work out.
    assert len(keys) >= 8
    assert len(set(keys)) == len(keys)


def test_each_unit_is_taken_with_the_planned_rate():
    photos, ends = Photos(200), [0]
    settings = plan(4, sample_rate=0.1, micro_batch=8, expected_batch=32)
    model = build_model(settings)
    train_private(
        model, settings, photos, units_of(*[1] * 200), device=CPU, on_step=lambda _: ends.append(len(photos.asked))
    )
    sizes = [sum(len(ids) for ids in photos.asked[a:b]) for a, b in itertools.pairwise(ends)]
    assert len(sizes) == 4
    assert len(set(sizes)) > 1, "Poisson batches differ in size"
    assert np.mean(sizes) == pytest.approx(20, abs=SPREADS * math.sqrt(200 * 0.1 * 0.9 / 4))


@pytest.mark.parametrize("draws", [1, 2])
def test_person_rounds_train(draws: int):
    settings = plan(2, unit="person", draws=draws, sample_rate=0.7)
    model = build_model(settings)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    train_private(model, settings, Photos(8), units_of(4, 1, 3), device=CPU)
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_the_learning_rate_of_a_private_step_is_that_of_its_number(monkeypatch: pytest.MonkeyPatch):
    seen: list[float] = []
    monkeypatch.setattr(dp_sgd, "set_lr", lambda _, rate: seen.append(rate))
    settings = experiment(privacy=DP, federation={"local_steps": 4}, optim={"lr": 0.2, "warmup_steps": 3})
    train_private(build_model(settings), settings, Photos(2), units_of(1, 1), device=CPU)
    assert seen == pytest.approx([0.2 / 3, 0.4 / 3, 0.2, 0.2])
