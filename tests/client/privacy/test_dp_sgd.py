"""DP-SGD steps and their accounting."""

import itertools
import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from opacus.accountants.analysis.prv import PoissonSubsampledGaussianPRV, compute_safe_domain_size
from torch import Tensor

from client.privacy import dp_sgd
from client.privacy.accounting import epsilon, safe_reach
from client.privacy.dp_sgd import train_private
from client.records.spending import Spending
from shared.diffusion.uvit import build_model
from shared.experiment.config import Experiment
from tests.client.conftest import DP, SIZE, experiment

CPU = torch.device("cpu")


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
        assert float(gradient.std()) == pytest.approx(2.0 * 0.5 / 8, rel=0.01)
        assert abs(float(gradient.mean())) < 1e-3


def test_noise_differs_between_rounds_although_the_seed_is_set():
    settings = plan(1, sample_rate=1e-9)
    first, second = noised_gradients(settings, 3)[0], noised_gradients(settings, 3)[0]
    assert not torch.equal(first, second)
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 0.01


@pytest.mark.parametrize("clipping", ["fast", "hooks"])
def test_gradient_sum_is_bounded_and_divided_by_the_public_normaliser(clipping: str):
    settings = plan(1, sample_rate=1.0, noise_multiplier=1e-9, max_grad_norm=1e-3, expected_batch=2, clipping=clipping)
    (gradient,) = noised_gradients(settings, 6)
    assert 0 < float(gradient.norm()) <= 6 * 1e-3 / 2


def test_micro_batches_sum_to_the_whole_batch(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dp_sgd, "secret_generator", lambda device: torch.Generator(device).manual_seed(1))
    # Without draws that depend on the split: one time step, no flip, and the noise level pinned.
    monkeypatch.setattr(dp_sgd, "draw_noise", fixed_draw)
    fixed = {"sample_rate": 1.0, "noise_multiplier": 1e-9, "max_grad_norm": 1e-3}
    whole = noised_gradients(plan(1, micro_batch=6, **fixed), 6)[0]
    parts = noised_gradients(plan(1, micro_batch=4, **fixed), 6)[0]
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-9)


def fixed_draw(settings: Experiment, batch: int, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    patches = settings.grid_size**2
    values = settings.model.patch_size**2 * 3
    eps = torch.linspace(-1, 1, patches * values).view(1, patches, values).expand(batch, -1, -1)
    return torch.full((batch,), 7), eps, torch.arange(patches).expand(batch, -1)


def test_hooks_and_fast_clipping_agree(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dp_sgd, "secret_generator", lambda device: torch.Generator(device).manual_seed(1))
    monkeypatch.setattr(dp_sgd, "draw_noise", fixed_draw)
    fixed = {"sample_rate": 1.0, "noise_multiplier": 1e-9, "max_grad_norm": 1e-2}
    fast, hooks = (noised_gradients(plan(1, clipping=each, **fixed), 4)[0] for each in ("fast", "hooks"))
    torch.testing.assert_close(fast, hooks, rtol=1e-4, atol=1e-8)


def test_each_unit_is_taken_with_the_planned_rate():
    photos = Photos(500)
    settings = plan(4, sample_rate=0.1, micro_batch=500)
    model = build_model(settings)
    train_private(model, settings, photos, units_of(*[1] * 500), device=CPU)
    sizes = [len(ids) for ids in photos.asked]
    assert len(sizes) == 4
    assert len(set(sizes)) > 1, "Poisson batches differ in size"
    assert np.mean(sizes) == pytest.approx(50, abs=4 * math.sqrt(500 * 0.1 * 0.9 / 4))


@pytest.mark.parametrize("draws", [1, 2])
def test_person_rounds_train(draws: int):
    settings = plan(2, unit="person", draws=draws, sample_rate=0.7)
    model = build_model(settings)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    train_private(model, settings, Photos(8), units_of(4, 1, 3), device=CPU)
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


# Reference values: q = 64/3000 and delta 1e-5, computed with dp-accounting's PLD accountant.
PLD = [(0.5, 50, 8.264), (1.0, 50, 1.216), (1.0, 1000, 4.188), (2.0, 50, 0.310), (2.0, 1000, 1.428)]


@pytest.mark.parametrize(("sigma", "steps", "expected"), PLD)
def test_epsilon_matches_an_independent_accountant(sigma: float, steps: int, expected: float):
    found = epsilon([Spending(sigma, 64 / 3000, steps)], 1e-5)
    assert found == pytest.approx(expected, rel=0.01, abs=0.012)


def test_epsilon_of_twenty_rounds_is_that_of_a_thousand_steps():
    rounds = [Spending(1.0254, 64 / 3000, 50)] * 20
    assert epsilon(rounds, 1e-5) == pytest.approx(3.996, abs=0.01)
    assert epsilon(rounds, 1e-5) == epsilon([Spending(1.0254, 64 / 3000, 1000)], 1e-5)
    assert epsilon([*rounds, rounds[0]], 1e-5) > 4


def test_epsilon_of_unequal_plans_does_not_depend_on_their_order():
    one, two = Spending(1.0, 0.02, 10), Spending(2.0, 0.05, 30)
    assert epsilon([one, two, one], 1e-5) == epsilon([two, one, one], 1e-5)
    assert epsilon([one, two], 1e-5) > max(epsilon([one], 1e-5), epsilon([two], 1e-5))


@pytest.mark.filterwarnings("ignore:Optimal order:UserWarning")  # at large noise; the grid only gets wider
def test_grid_reaches_as_far_as_opacus_has_it():
    history = [(1.0, 0.2, 40), (0.7, 0.05, 3), (30.0, 1.0, 1)]
    prvs = [PoissonSubsampledGaussianPRV(rate, sigma) for sigma, rate, _ in history]
    expected = compute_safe_domain_size(prvs, [steps for _, _, steps in history], 0.01, 1e-8)
    assert safe_reach(history, 0.01, 1e-8) == pytest.approx(expected, rel=1e-12)


def test_huge_plans_cost_precision_and_then_have_no_bound_but_never_the_memory(monkeypatch: pytest.MonkeyPatch):
    plan = [Spending(1.0, 0.5, 100)]
    exact = epsilon(plan, 1e-5)
    monkeypatch.setattr(dp_sgd, "LARGEST_GRID", 2**15)
    assert exact < epsilon(plan, 1e-5) < exact + 2
    assert epsilon([Spending(2.0, 0.2, 3 * 10**8)], 1e-5) == math.inf


def test_epsilon_at_the_edges():
    assert epsilon([], 1e-5) == 0
    assert epsilon([Spending(1.0, 0.1, 0)], 1e-5) == 0
    assert epsilon([Spending(0.0, 0.1, 1)], 1e-5) == math.inf
    assert 0 < epsilon([Spending(5.0, 1.0, 1)], 1e-5) < 2, "the plain Gaussian mechanism"
