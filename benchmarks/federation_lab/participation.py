"""Uneven worlds: who takes part in a round, for how many of its steps, and what that weighs.

Shapes: G groups of k sites, M = G k networks.
"""
# ruff: noqa: N803, N806 - shape suffixes

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.federation_lab.arms import Arm
from shared.seeding import Streams

STRAGGLER_SHARE = 0.1
"""Of a round's steps that a straggler does in time."""


class Participation:
    """Of one arm: sites' steps in each round, and shares of the mean."""

    def __init__(self, arm: Arm, seeds: Sequence[int], counts_M: Sequence[int]) -> None:
        """`counts_M`: images of each site."""
        self.arm, self.seeds, self.counts_M = arm, seeds, torch.tensor(counts_M, dtype=torch.float64)
        self.per_group = len(counts_M) // len(seeds)

    def steps(self, begin: int, end: int) -> list[int]:
        """Steps of the round [begin, end) that each network does; 0: it is not asked."""
        chosen = [self._group(seed, begin, end - begin) for seed in self.seeds]
        return [steps for group in chosen for steps in group]

    def shares(self, steps_M: Sequence[int]) -> Tensor:
        """Of each network in its group's mean, (M,): by images, their root or alike, times the steps done."""
        size_M = {"equal": self.counts_M**0, "sqrt": self.counts_M**0.5, "examples": self.counts_M}[self.arm.weighting]
        work = (size_M * torch.tensor(steps_M, dtype=torch.float64)).unflatten(0, (-1, self.per_group))
        return (work / work.sum(1, keepdim=True)).flatten()

    def _group(self, seed: int, begin: int, whole: int) -> list[int]:
        everybody = [whole] * self.per_group
        match self.arm.uneven:
            case "half":
                random = Streams(seed, ("lab", "asked")).generator(begin)
                asked = torch.randperm(self.per_group, generator=random)[: self.per_group // 2].tolist()
                return [whole * (site in asked) for site in range(self.per_group)]
            case "straggler":
                return [*everybody[1:], max(1, round(whole * STRAGGLER_SHARE))]
            case "joiner":
                return [*everybody[1:], whole * (begin >= self.arm.steps // 2)]
            case _:
                return everybody


class Frozen:
    """Networks whose round has ended before the others': what the steps after it make of them is taken back."""

    def __init__(self, tensors: Callable[[], list[Tensor]], steps_M: Sequence[int]) -> None:
        """`tensors`: all that a network has of its own, with an axis of networks; moments come with the first step."""
        self._tensors, self._steps_M = tensors, steps_M
        self._kept: list[tuple[Tensor, list[Tensor]]] = []

    def stop(self, inside: int) -> None:
        """Remember the networks that have done all their steps before the 0-based step `inside`."""
        rows = torch.tensor([row for row, steps in enumerate(self._steps_M) if steps == inside], dtype=torch.long)
        if len(rows):
            self._kept.append((rows, [tensor[rows].clone() for tensor in self._tensors()]))

    def take_back(self) -> None:
        """At the end of the round."""
        for rows, kept in self._kept:
            tensors = self._tensors()
            for tensor, values in zip(tensors, kept, strict=False):
                tensor[rows] = values
            for tensor in tensors[len(kept) :]:
                tensor[rows] = 0.0
