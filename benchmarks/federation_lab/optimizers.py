"""Optimizers of the stack: AdamW as all sites' batches would have it, and the product's Muon for stacks of matrices.

Shapes: M networks, A rows and B columns of a matrix.
"""
# ruff: noqa: N803 - shape suffixes

import math

import torch
from torch import Tensor

from shared.training.optimizer import ITERATIONS, LENGTH, MOMENTUM, NEWTON_SCHULZ, TINY


class PooledAdamW(torch.optim.Optimizer):
    """AdamW with the second moment of the mean of `sites` batches: m^2 + max(v - m^2, 0) / sites.

    A site's second moment is that of its own batch, whose noise is `sites` times that of all batches together, so its
    steps are shorter than theirs. With one site it is AdamW (arXiv 1711.05101, Algorithm 2) wherever v is at least m^2.
    """

    def __init__(self, groups: list[dict], betas: tuple[float, float], sites: int) -> None:
        super().__init__(groups, {"lr": 0.0, "betas": betas, "weight_decay": 0.0, "eps": 1e-8, "sites": sites})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One step of every network."""
        for group in self.param_groups:
            for weight in group["params"]:
                self._move(weight, group)

    def _move(self, weight: Tensor, group: dict) -> None:
        state, (beta_1, beta_2) = self.state[weight], group["betas"]
        if not state:
            state |= {"step": 0, "exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
        state["step"] += 1
        first = state["exp_avg"].lerp_(weight.grad, 1 - beta_1) / (1 - beta_1 ** state["step"])
        second = state["exp_avg_sq"].lerp_(weight.grad.square(), 1 - beta_2) / (1 - beta_2 ** state["step"])
        square = first.square()
        pooled = square + (second - square).clamp(min=0) / group["sites"]
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.addcdiv_(first, pooled.sqrt_().add_(group["eps"]), value=-group["lr"])


class StackedMuon(torch.optim.Optimizer):
    """`shared.training.optimizer.MuonWithAdamW`'s matrices, for stacks (M, A, B)."""

    def __init__(self, weights: list[Tensor], weight_decay: float) -> None:
        super().__init__([{"params": weights}], {"lr": 0.0, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One step of every network."""
        for group in self.param_groups:
            for weight in group["params"]:
                momentum = self.state[weight].setdefault("momentum_buffer", torch.zeros_like(weight))
                momentum.lerp_(weight.grad, 1 - MOMENTUM)
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                length = LENGTH * math.sqrt(max(weight.shape[1:]))
                weight.sub_(orthogonal(weight.grad.lerp(momentum, MOMENTUM)), alpha=group["lr"] * length)


def orthogonal(matrices_MAB: Tensor) -> Tensor:
    """Each matrix with singular values near 1, by Newton and Schulz's iteration."""
    if matrices_MAB.shape[1] > matrices_MAB.shape[2]:
        return orthogonal(matrices_MAB.mT).mT
    a, b, c = NEWTON_SCHULZ
    x = matrices_MAB / matrices_MAB.norm(dim=(1, 2), keepdim=True).clamp(min=TINY)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x
