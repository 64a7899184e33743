# ruff: noqa: N803
"""Is a face among the images? Weights whose gradient overflows for that face alone make its presence visible.

Where a round fails, or its update is not finite, exactly when the face was sampled, refusals and broken updates are a
membership test that no epsilon counts. Routes: the MLP, with both ways to clip, and the MLP
behind wavelet bands.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
from torch import Tensor

from benchmarks.privacy_attacks.detector import Weights, detector, make_arena, make_experiment, make_request
from benchmarks.privacy_attacks.outcome import Outcome
from client.data.units import ImageReader, Shown, read_images
from client.privacy import clipping
from client.privacy.accounting import epsilon
from client.privacy.dp_sgd import PrivateStep
from client.records.spending import Spending
from client.training_request import handle
from shared.diffusion.losses import Draw
from shared.messages.training import TrainReply

SIGMA, DELTA = 100.0, 1e-5
DP = {
    "mechanism": "dp-sgd",
    "noise_multiplier": SIGMA,
    "sample_rate": 1.0,
    "expected_batch": 16,
    "micro_batch": 16,
}


def through_mlp(weights: Weights) -> None:
    """The filter's value, if above zero, times 3e44."""
    weights["mid_block.mlp.fc1.weight"][0, 0] = 1e6
    weights["mid_block.mlp.fc2.weight"][3, 0] = 3e38


def attack(
    trials: int,
    is_guarded: bool,
    seed: int,
    *,
    name: str,
    craft: Callable[[Weights], None],
    how: str = "fast",
    wavelet: str = "",
) -> Outcome:
    """Ask one of two sites that differ by the face, `trials` times, and guess which it was."""
    patch = 16 if wavelet else 32
    plan_of = partial(
        make_experiment,
        privacy={**DP, "clipping": how},
        data={"wavelet": wavelet, "horizontal_flip": False},
        model={"patch_size": patch},
    )
    coins, correct = np.random.default_rng(seed).random(trials) < 0.5, 0
    with tempfile.TemporaryDirectory() as folder, guard(is_guarded), without_noise():
        plan = plan_of()
        arena = make_arena(Path(folder).resolve(), plan, seed)
        weights, _ = detector(arena, plan)
        craft(weights)
        for number, is_in in enumerate(coins.tolist()):
            reply = handle(make_request(plan, weights, f"run{number}").to_record(), arena.homes[int(is_in)])
            correct += is_broken(reply) == is_in
    return Outcome(name, trials, correct, epsilon([Spending(SIGMA, 1.0, 1)], DELTA))


def is_broken(reply: TrainReply) -> bool:
    """Whether a round failed, or its update shows that something was not finite."""
    if reply.header.status != "trained" or reply.update is None:
        return True
    return not np.isfinite(reply.update).all() or not reply.update.any()


def without_noise() -> AbstractContextManager[object]:
    """The best case for the attacker: two time steps that leave pictures as they are, a schedule that is refused."""
    return mock.patch("shared.experiment.sections._linear_alpha_bar_end", lambda _: 0.0)


@contextmanager
def guard(is_guarded: bool) -> Iterator[None]:
    """With the guard off, every unit counts, and a micro-batch whose sum is not finite ends the round."""
    if is_guarded:
        yield
        return
    with mock.patch.object(clipping, "_factors", partial_factors), mock.patch.object(PrivateStep, "add", partial_add):
        yield


def partial_factors(_model: object, norms_B: Tensor, _length_B: Tensor, bound: float, is_present_B: Tensor) -> Tensor:
    """Clipping factors that are not defined for every unit."""
    return (bound / norms_B).clamp(max=1.0) * is_present_B


def partial_add(self: PrivateStep, images: ImageReader, shown: Shown, draw: Draw) -> None:
    """Adding a micro-batch that is not done again."""
    batch, is_present = self._blank(), self._nobody()
    batch[: len(shown.ids_BK)] = read_images(images, shown, 1)
    is_present[: len(shown.ids_BK)] = True
    self._add(batch, is_present, draw)


ATTACKS = {
    name: partial(attack, name=name, craft=craft, how=how, wavelet=wavelet)
    for name, craft, how, wavelet in (
        ("overflow in the MLP, fast", through_mlp, "fast", ""),
        ("overflow in the MLP, hooks", through_mlp, "hooks", ""),
        ("overflow behind wavelets, fast", through_mlp, "fast", "haar"),
    )
}
