"""What a unit adds depends on nothing but the unit, and its numbers do not show in the time of a step."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from client.data.units import Shown
from client.privacy.arithmetic import is_place_alike, one_by_one, tiny_as_zero
from client.privacy.dp_sgd import PrivateStep, train_private
from client.privacy.randomness.secret_random import SecretRandom, secret_streams
from shared.diffusion.losses import Draw, per_unit_loss
from shared.diffusion.uvit import build_model
from tests.client.privacy.test_dp_sgd import CPU, Photos, plan, units_of
from tests.client.privacy.test_totality import Numbered

C = 0.5


def make_step(clipping: str = "fast", loss=per_unit_loss, deviation: float = 0.05, slots: int = 4) -> PrivateStep:
    private = plan(1, max_grad_norm=C, clipping=clipping, expected_batch=4 * slots, micro_batch=slots, sample_rate=1.0)
    model = build_model(private)
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=deviation)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("embedding", "positions", "mid_block.mlp.fc1", "norm", "output")))
    return PrivateStep(model, private, CPU, "float32", loss)


def losses_plus(change):
    """Losses that also depend on what `change` gives for a micro-batch's losses."""

    def loss(*given):
        losses = per_unit_loss(*given)
        return losses * (1 + change(losses))

    return loss


@pytest.mark.parametrize("clipping", ["fast", "hooks"])
def test_this_machine_computes_a_unit_alike_in_every_place(clipping: str):
    step = make_step(clipping, slots=7)
    weights = [parameter.detach().clone() for parameter in step.model.parameters()]
    step.rehearse()
    assert step.slots == 7
    assert all(torch.equal(a, b) for a, b in zip(weights, step.model.parameters(), strict=True))


@pytest.mark.parametrize("clipping", ["fast", "hooks"])
@pytest.mark.parametrize(
    "change",
    [
        lambda loss_B: torch.arange(len(loss_B)) * 2.0**-20,  # the place
        lambda loss_B: (torch.arange(len(loss_B)) == len(loss_B) - 1) * 2.0**-20,  # the last place
        lambda loss_B: loss_B.detach().mean() * 2.0**-18,  # the neighbours
    ],
)
def test_where_a_units_place_or_neighbours_count_each_unit_is_alone(clipping: str, change):
    step = make_step(clipping, losses_plus(change))
    # Weights that hide it: all is zero, so the losses of a unit do not depend on them.
    for parameter in step.model.parameters():
        parameter.data.zero_()
    step.rehearse()
    assert step.slots == 1
    step.take(Photos(3), units_of(1, 1, 1), secret_streams())
    assert all(parameter.grad.isfinite().all() for parameter in step.parameters)


def test_numbers_that_are_undefined_on_random_weights_put_each_unit_alone():
    step = make_step(loss=losses_plus(lambda loss_B: torch.full_like(loss_B, torch.nan)))
    step.rehearse()
    assert step.slots == 1


def contributions(step: PrivateStep, order: list[int], draws: list[Draw]) -> Tensor:
    """The rounded sum of units in an order, each with its own draws, in C."""
    step.total.zero_()
    for start in range(0, len(order), step.slots):
        some = order[start : start + step.slots]
        filled = some + [0] * (step.slots - len(some))
        draw = Draw(*(torch.cat(parts) for parts in zip(*(draws[unit] for unit in filled), strict=True)))
        step.add(Numbered(), Shown(np.array(some).reshape(-1, 1), torch.zeros(len(some), 1, dtype=torch.bool)), draw)
    return step.total.round() * (step.grid / C)


@pytest.mark.parametrize("clipping", ["fast", "hooks"])
@pytest.mark.parametrize("deviation", [0.05, 3.0])  # a usual network, and one that blows up every last bit
def test_removing_a_unit_at_any_place_moves_the_rounded_sum_by_at_most_c(clipping: str, deviation: float):
    # A thousand times the loss: every unit is clipped.
    step, units = make_step(clipping, losses_plus(lambda _: 999.0), deviation, slots=3), 7
    random = SecretRandom(bytes(32))
    draws = [Draw(*(each[:1] for each in step._draw(random))) for _ in range(units)]
    order = list(range(units))
    whole = contributions(step, order, draws)
    assert float(whole.norm()) > 1
    for place in range(units):
        others = order[:place] + order[place + 1 :]
        moved = order[:place] + order[-1:] + order[place + 1 : -1] if place < units - 1 else order[:-1]
        alone = contributions(step, [order[place]], draws)
        for rest in (others, moved):
            change = whole - contributions(step, rest, draws)
            assert float(change.norm()) <= 1 + 1e-6
            # What is taken away is the unit's own part, within what float32 rounds.
            assert float((change - alone).norm()) <= 4 * 3**2 * 2.0**-24 + 3 * len(change) ** 0.5 * step.grid / C


def test_units_come_in_another_order_in_every_step():
    step, orders = make_step(slots=5), set()
    for _ in range(12):
        photos = Photos(5)
        step.take(photos, units_of(*[1] * 5), secret_streams())
        orders.add(tuple(np.concatenate(photos.asked).tolist()))
    assert all(sorted(order) == list(range(5)) for order in orders)
    assert len(orders) > 1  # all twelve are alike once in 120^11


def test_tiny_numbers_are_zero_in_a_private_round_and_only_there():
    seen: list[float] = []

    def loss(*given):
        seen.append(float(torch.full((1,), 2.0**-140) * 1.0))
        return per_unit_loss(*given)

    with tiny_as_zero():
        flushes = float(torch.full((1,), 2.0**-140) * 1.0) == 0
    assert flushes == torch.set_flush_denormal(False), "a CPU that can does"
    private = plan(1, sample_rate=1.0)
    train_private(build_model(private), private, Photos(2), units_of(1, 1), device=CPU, loss=loss)
    assert seen and all((each == 0) == flushes for each in seen)
    assert float(torch.full((1,), 2.0**-140) * 1.0) == 2.0**-140


def test_trial_keeps_the_models_own_weights_when_the_loss_raises():
    model = nn.Linear(2, 2)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    draw = Draw(torch.zeros(2, dtype=torch.long), torch.zeros(2, 1, 1), torch.zeros(2, 1, dtype=torch.long))

    def gradients(_: Draw):
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        is_place_alike(model, 2, gradients, draw, draw, draw)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def brightness(images: Tensor) -> np.ndarray:
    return images.double().mean((1, 2, 3)).numpy()


@pytest.mark.parametrize(
    "change",
    [
        lambda found: np.arange(len(found)) * 1e-12,  # the place
        lambda found: found.mean() * 1e-12,  # the neighbours
        lambda found: np.full(len(found), np.nan),
    ],
)
def test_rows_that_depend_on_other_images_are_computed_image_by_image(change):
    images = torch.randint(256, (5, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    calls: list[int] = []

    def compute(given: Tensor) -> np.ndarray:
        calls.append(len(given))
        return brightness(given) + change(brightness(given))

    rows = one_by_one(compute, 6, 4)
    tried = len(calls)
    whole = rows(images)
    assert whole.shape == (5,) and calls[tried:] == [6] * 5
    np.testing.assert_array_equal(rows(images[2:]), whole[2:])


def test_rows_of_images_that_do_not_look_at_each_other_are_those_of_one_full_call():
    images = torch.randint(256, (5, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    calls: list[int] = []

    def compute(given: Tensor) -> np.ndarray:
        calls.append(len(given))
        return brightness(given)

    rows = one_by_one(compute, 6, 4)
    tried = len(calls)
    np.testing.assert_array_equal(rows(images), brightness(images))
    np.testing.assert_array_equal(rows(images[:1]), brightness(images[:1]))
    assert calls[tried:] == [6, 6]


def test_trial_of_somebody_elses_network_is_made_on_random_weights():
    model = nn.Linear(1, 1)
    nn.init.zeros_(model.weight)

    calls: list[int] = []

    def compute(given: Tensor) -> np.ndarray:
        calls.append(len(given))
        # Whether its rows depend on the place shows only where the weights are not zero.
        return brightness(given) * (1 + float(model.weight.detach()) * np.arange(len(given)))

    rows = one_by_one(compute, 6, 4, [model])
    assert float(model.weight.detach()) == 0, "its own weights are back"
    tried = len(calls)
    rows(torch.ones(3, 3, 4, 4, dtype=torch.uint8))
    assert calls[tried:] == [6] * 3
