# ruff: noqa: N803
"""Is a face among the images? Weights whose gradient overflows for that face alone make its presence visible.

Where a round fails, or its update is not finite, exactly when the face was sampled, refusals and broken updates are a
membership test that no epsilon counts. Routes: the MLP, with both ways to clip and behind wavelet bands; the softmax of
attention; the gradient of the embedding, where all else is finite.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from unittest import mock

import numpy as np
from torch import Tensor

from benchmarks.privacy_attacks.detector import (
    SIZE,
    WIDTH,
    Weights,
    detector,
    make_arena,
    make_experiment,
    make_request,
    without_noise,
)
from benchmarks.privacy_attacks.outcome import Outcome
from benchmarks.privacy_attacks.question_site import computed_once, fresh_copy
from benchmarks.privacy_attacks.tiny_sites import new_machine
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


def through_mlp(weights: Weights, _height: float) -> None:
    """The filter's value, if above zero, times 3e44."""
    weights["mid_block.mlp.fc1.weight"][0, 0] = 1e6
    weights["mid_block.mlp.fc2.weight"][3, 0] = 3e38


def through_softmax(weights: Weights, _height: float) -> None:
    """Query and key are 4e20 for the face, so their product is infinite, and infinity less infinity no number."""
    weights["in_blocks.0.mlp.fc1.weight"][0, 0] = 1e6
    weights["in_blocks.0.mlp.fc2.weight"][3, 0] = 1.0
    for row in (0, WIDTH):
        weights["mid_block.attention.qkv.weight"][row, 3] = 3e19


def through_embedding(weights: Weights, height: float) -> None:
    """All values stay finite, the loss as well; only the gradient of the embedding does not, for the face alone.

    The filter is made small and the MLP large, so that the face's channel is about 1e3 and its derivative 1e8.
    """
    weights["embedding.weight"][0] *= 1e-5 / height
    weights["embedding.bias"][0] *= 1e-5 / height
    weights["mid_block.mlp.fc1.weight"][0, 0] = 1e10
    weights["mid_block.mlp.fc2.weight"][3, 0] = 1.0
    # The difference of two channels, so that what the layer norm's rounding leaves in both cancels.
    weights["output.weight"][:, 3], weights["output.weight"][:, 4] = 1e16, -1e16


def attack(
    trials: int,
    is_guarded: bool,
    seed: int,
    *,
    name: str,
    craft: Callable[[Weights, float], None],
    how: str = "fast",
    wavelet: str = "",
    trained: tuple[str, ...] = ("output.bias",),
) -> Outcome:
    """Ask one of two sites that differ by the face, in each trial as if for the first time, and guess which it was."""
    coins, correct = np.random.default_rng(seed).random(trials) < 0.5, 0
    with new_machine() as root, guard(is_guarded), without_noise(), computed_once():
        plan = make_experiment(
            privacy={**DP, "clipping": how},
            data={"wavelet": wavelet, "horizontal_flip": False},
            model={"patch_size": SIZE // 2 if wavelet else SIZE},
            federation={"trainable": trained},
        )
        arena = make_arena(root, plan, seed)
        weights, height = detector(arena, plan)
        craft(weights, height)
        request = make_request(plan, weights, "run").to_record()
        for number, is_in in enumerate(coins.tolist()):
            home = fresh_copy(arena.homes[int(is_in)], root / str(number))
            correct += is_broken(handle(request, home)) == is_in
    return Outcome(name, trials, correct, epsilon([Spending(SIGMA, 1.0, 1)], DELTA))


def is_broken(reply: TrainReply) -> bool:
    """Whether a round failed, or its update shows that something was not finite."""
    assert reply.header.refusal in (None, "failed"), f"the site's policy refuses the attack: {reply.header.reason}"
    if reply.header.status != "trained" or reply.update is None:
        return True
    return not np.isfinite(reply.update).all() or not reply.update.any()


@contextmanager
def guard(is_guarded: bool) -> Iterator[None]:
    """With the guard off, a micro-batch with a unit whose gradient is not finite ends the round."""
    if is_guarded:
        yield
        return
    with mock.patch.object(clipping, "_factors", partial_factors), mock.patch.object(PrivateStep, "add", partial_add):
        yield


def partial_factors(_model: object, norms_B: Tensor, bound: float, is_present_B: Tensor) -> Tensor:
    """Clipping factors that are not defined for every unit."""
    if not norms_B.isfinite().all():
        raise ArithmeticError("a gradient is not finite")
    return (bound / norms_B).clamp(max=1.0) * is_present_B


def partial_add(self: PrivateStep, images: ImageReader, shown: Shown, draw: Draw) -> None:
    """Adding a micro-batch that is not done again."""
    batch, is_present = self._blank(), self._nobody()
    batch[: len(shown.ids_BK)] = read_images(images, shown, 1)
    is_present[: len(shown.ids_BK)] = True
    self._add(batch, is_present, draw)


ATTACKS = {
    name: partial(attack, name=name, craft=craft, **options)
    for name, craft, options in (
        ("overflow in the MLP, fast", through_mlp, {}),
        ("overflow in the MLP, hooks", through_mlp, {"how": "hooks"}),
        ("overflow behind wavelets", through_mlp, {"wavelet": "haar"}),
        ("overflow in the softmax", through_softmax, {}),
        ("overflow in the embedding", through_embedding, {"trained": ("embedding.weight", "embedding.bias")}),
    )
}
