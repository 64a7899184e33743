"""Averages over the rounds' models, and what each loses on held-out persons."""
# ruff: noqa: N806 - shape suffixes

from collections.abc import Sequence

import torch

from benchmarks.federation_lab.training import Point, StackedTraining, Weights, losses, stack_draws
from benchmarks.federation_lab.world import World
from server.federation.updates.server_optimizer import ema_decay
from shared.diffusion.losses import Draw

POWERS = {"power-0.05": 16.97, "power-0.10": 6.937, "power-0.20": 1.826}
"""Power-function averages (EDM2, arXiv 2312.02696, Eq. 2 and 4): the gamma of each relative width."""
NAMES = ("raw", "ema", *POWERS)
CHUNK = 128


class Averages:
    """All of them at once, kept while an arm runs: none changes the training."""

    def __init__(self, start: Point, decay: float) -> None:
        """Begin at the start; `decay` is of the product's moving average, per step."""
        self.decay, self.step = decay, start.step
        self.means = {name: {key: weight.clone() for key, weight in start.weights.items()} for name in NAMES}

    def add(self, point: Point) -> None:
        """The models after a round."""
        for name, mean in self.means.items():
            left = self.left(name, self.step, point.step)
            for key, weight in point.weights.items():
                mean[key].lerp_(weight, 1 - left)
        self.step = point.step

    def left(self, name: str, before: int, after: int) -> float:
        """Share of the average at step `before` in that at step `after`."""
        if name == "raw":
            return 0.0
        if name == "ema":
            return ema_decay(self.decay, after - before, after)
        return (before / after) ** (POWERS[name] + 1)


@torch.no_grad()
def held_out(training: StackedTraining, worlds: Sequence[World], weights: Weights) -> list[tuple[float, float]]:
    """Mean loss on held-out persons, and its standard error, for each group."""
    each = len(next(iter(weights.values()))) // len(worlds)
    images = torch.stack([world.held_out[0] for world in worlds]).repeat_interleave(each, 0)
    draw = stack_draws([world.held_out[1] for world in worlds for _ in range(each)])
    found = []
    for begin in range(0, images.shape[1], CHUNK):
        part = slice(begin, begin + CHUNK)
        seen = Draw(*(field[:, part] for field in draw))
        found.append(losses(training.network, training.schedule, training.setting, weights, images[:, part], seen))
    loss_MB = torch.cat(found, 1).double()
    errors = loss_MB.std(1) / loss_MB.shape[1] ** 0.5
    return list(zip(loss_MB.mean(1).tolist(), errors.tolist(), strict=True))
