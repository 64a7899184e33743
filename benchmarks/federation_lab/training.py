"""One arm: all its seeds and sites are networks of one stack, and the rounds go as the product's do."""
# ruff: noqa: N803, N806 - shape suffixes

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.federation_lab.arms import ROUND_STEPS, WARMUP, Arm
from benchmarks.federation_lab.optimizers import PooledAdamW, StackedMuon
from benchmarks.federation_lab.participation import Frozen, Participation
from benchmarks.federation_lab.stacked import StackedUViT
from benchmarks.federation_lab.wires import Download, Feedback
from benchmarks.federation_lab.world import NETWORK, SiteDraws, World, experiment
from server.federation.updates.server_optimizer import ServerState, apply_update
from shared.diffusion.losses import Draw, per_image_loss
from shared.diffusion.schedule import make_schedule
from shared.experiment.federation import FederationConfig
from shared.training.optimizer import make_optimizer, set_lr

Weights = dict[str, Tensor]
ORTHOGONAL = re.compile(r"_block.*(qkv|projection|fc1|fc2|skip)\.weight$")
"""Matrices of the blocks: what Muon trains."""


@dataclass(frozen=True)
class Point:
    """Global models after a round: weights (G, ...) of each group, in the order of the seeds."""

    step: int
    weights: Weights


class StackedTraining:
    """G groups of k sites; networks M = G k, those of a group side by side.

    A group is a federation of one seed, or one site where sites are alone.
    """

    def __init__(self, arm: Arm, worlds: Sequence[World], round_steps: int = ROUND_STEPS, warmup: int = WARMUP) -> None:
        self.arm, self.warmup, self.seeds = arm, warmup, [world.seed for world in worlds]
        self.per_group = 1 if arm.alone else arm.num_sites
        self.draws = [
            SiteDraws(world.seed, f"{arm.division}-{number}", images, arm, round_steps)
            for world in worlds
            for number, images in enumerate(world.sites(arm))
        ]
        starts = [start for world in worlds for start in [world.start(arm.start)] * arm.num_sites]
        self.setting = experiment(arm, 0)
        self.model = NETWORK(in_channels=3, grid_size=self.setting.grid_size, patch_size=4)
        self.network, self.schedule = StackedUViT(self.model), make_schedule("cosine", 1000)
        # A module whose parameters are the stack: the product's optimizer sorts them into its groups by their shape.
        self.weights = {
            name: torch.nn.Parameter(torch.stack([start[name] for start in starts]))
            for name, _ in self.model.named_parameters()
        }
        self.optimizers = self._new_optimizers()
        self.server = ServerState()
        self.momentum: Weights = {}
        self.upload, self.download = Feedback(arm.up), Download(arm.down)
        self.push: list[Tensor] = []
        self.participation = Participation(arm, self.seeds, [len(draws.images) for draws in self.draws])
        self.shares_M: Tensor | None = None

    def run(self, told: Callable[[int], None] = lambda _: None) -> Iterator[Point]:
        """All rounds; the global models after each, the start first."""
        before = self._global()
        yield Point(0, before)
        self._send(before)
        for begin in range(0, self.arm.steps, self.arm.local_steps):
            end = min(begin + self.arm.local_steps, self.arm.steps)
            if self.arm.keep == "no":
                for optimizer in self.optimizers:
                    optimizer.state.clear()
            steps_M = self.participation.steps(begin, end)
            frozen = Frozen(self._tensors_of_sites, steps_M)
            for step in range(begin, end):
                frozen.stop(step - begin)
                self.step(step, begin, end)
                told(step + 1)
            frozen.take_back()
            if self.arm.uneven != "no":
                self.shares_M = self.participation.shares(steps_M)
            after = self._end_round(before)
            self.push = [self._spread((after[name] - before[name]) * self.arm.push / (end - begin)) for name in after]
            before = after
            yield Point(end, before)

    def step(self, step: int, begin: int, end: int) -> Tensor:
        """One step of every network, the losses (M,)."""
        for optimizer in self.optimizers:
            set_lr(optimizer, self.arm.lr * rate(self.arm, self.warmup, step, begin, end))
            optimizer.zero_grad(set_to_none=True)
        batches = [draws.batch(step) for draws in self.draws]
        images_MBCHW, draw = torch.stack([images for images, _ in batches]), stack_draws([draw for _, draw in batches])
        loss_M = losses(self.network, self.schedule, self.setting, self.weights, images_MBCHW, draw).mean(1)
        loss_M.sum().backward()
        gradients = [_grad(weight) for weight in self.weights.values()]
        if self.arm.synchronised:
            for gradient in gradients:
                gradient.copy_(self._spread(self._mean(gradient)))
        clip_each(gradients, self.setting.optim.grad_clip)
        for optimizer in self.optimizers:
            optimizer.step()
        if self.arm.push and self.push:
            torch._foreach_add_([weight.detach() for weight in self.weights.values()], self.push)
        return loss_M.detach()

    def _end_round(self, before: Weights) -> Weights:
        """The server's step, and what every site starts the next round from; the global weights."""
        if self.per_group == 1 and self.arm.server == "fedavg":
            return self._global()
        after = self._server_step(before)
        self._send(after)
        if self.arm.keep == "averaged":
            for state in self.optimizers[0].state.values():
                for moment in ("exp_avg", "exp_avg_sq"):
                    state[moment].copy_(self._spread(self._mean(state[moment])))
        return after

    def _send(self, weights: Weights) -> None:
        """Every site starts from what arrives of `weights`."""
        self.sent = _split(self.download.sent(_rows(weights)), weights)
        for name, arrived in self.sent.items():
            self.weights[name].data.copy_(self._spread(arrived))

    def _deltas(self, before: Weights) -> Weights:
        """Mean update of each group's sites, as it arrives."""
        if self.arm.up == self.arm.down == "float32":
            return {name: self._mean(weight.detach()) - before[name] for name, weight in self.weights.items()}
        updates = {name: weight.detach() - self._spread(self.sent[name]) for name, weight in self.weights.items()}
        return _split(self._mean(self.upload.sent(_rows(updates), self.shares_M)), before)

    def _server_step(self, before: Weights) -> Weights:
        deltas = self._deltas(before)
        eta, mu = self.arm.server_lr, self.arm.server_momentum
        if self.arm.server == "nesterov":
            for name, delta in deltas.items():
                self.momentum[name] = mu * self.momentum.get(name, torch.zeros_like(delta)) + delta
            return {name: before[name] + eta * (mu * self.momentum[name] + delta) for name, delta in deltas.items()}
        config = FederationConfig(server_optimizer=self.arm.server, server_lr=eta, server_momentum=mu)
        flat, self.server = apply_update(_flat(before), _flat(deltas), self.server, config)
        sizes = [weight.numel() for weight in before.values()]
        parts = torch.from_numpy(flat).split(sizes)
        return {name: part.view_as(before[name]) for name, part in zip(before, parts, strict=True)}

    def _new_optimizers(self) -> list[torch.optim.Optimizer]:
        """The product's, over the stack: a bias of a stack has two axes, so the groups are made on one network."""
        optim = self.setting.optim
        adamw: torch.optim.Optimizer = make_optimizer(self.model, optim)
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        matrices = [name for name in self.weights if ORTHOGONAL.search(name)] if self.arm.optimizer == "muon" else []
        for group in adamw.param_groups:
            chosen = [names[id(parameter)] for parameter in group["params"]]
            group["params"] = [self.weights[name] for name in chosen if name not in matrices]
        if self.arm.optimizer == "pooled":
            groups = [{key: group[key] for key in ("params", "weight_decay")} for group in adamw.param_groups]
            adamw = PooledAdamW(groups, optim.betas, self.arm.num_sites)
        weights: list[Tensor] = [self.weights[name] for name in matrices]
        return [adamw, *([StackedMuon(weights, optim.weight_decay)] if weights else [])]

    def _tensors_of_sites(self) -> list[Tensor]:
        """What each site has of its own: weights and the optimizers' moments, with an axis of networks."""
        states = [state for optimizer in self.optimizers for state in optimizer.state.values()]
        moments = [moment for state in states for moment in state.values() if torch.is_tensor(moment) and moment.ndim]
        return [*(weight.detach() for weight in self.weights.values()), *moments]

    def _mean(self, tensor: Tensor) -> Tensor:
        if self.shares_M is not None:
            shares = self.shares_M.to(tensor.dtype).view(-1, *(1,) * (tensor.ndim - 1))
            return (tensor * shares).unflatten(0, (-1, self.per_group)).sum(1)
        return tensor.unflatten(0, (-1, self.per_group)).mean(1)

    def _spread(self, tensor: Tensor) -> Tensor:
        return tensor.repeat_interleave(self.per_group, 0)

    def _global(self) -> Weights:
        return {name: weight.detach()[:: self.per_group].clone() for name, weight in self.weights.items()}


def rate(arm: Arm, warmup: int, step: int, begin: int, end: int) -> float:
    """Share of the learning rate at 0-based `step` of the run, in the round of steps [begin, end)."""
    since = step - begin if arm.warmup == "round" else step
    ramp = min(1.0, (since + 1) / warmup) if warmup else 1.0
    match arm.decay:
        case "none":
            return ramp
        case "cosine":
            return ramp * (1 + math.cos(math.pi * step / arm.steps)) / 2
        case "linear":
            return ramp * (1 - step / arm.steps)
        case "end":
            return ramp * min(1.0, (1 - step / arm.steps) / 0.4)
        case "round":
            return ramp * (1 - (step - begin) / (end - begin))


def losses(
    network: StackedUViT, schedule: object, setting: object, weights: Weights, images_MBCHW: Tensor, draw: Draw
) -> Tensor:
    """The product's loss of each image under its network, (M, B)."""
    shape = images_MBCHW.shape[:2]

    def folded(x_NVP: Tensor, t_N: Tensor, _ids: Tensor) -> Tensor:
        return network(weights, x_NVP.unflatten(0, shape), t_N.unflatten(0, shape)).flatten(0, 1)

    flat = Draw(*(part.flatten(0, 1) for part in draw))
    return per_image_loss(folded, schedule, setting, images_MBCHW.flatten(0, 1), *flat).unflatten(0, shape)  # type: ignore[arg-type]


def stack_draws(draws: Sequence[Draw]) -> Draw:
    """Draws of several networks as one, with a leading axis."""
    return Draw(*(torch.stack(parts) for parts in zip(*draws, strict=True)))


def clip_each(gradients: Sequence[Tensor], limit: float) -> None:
    """Scale each network's gradient to `limit`, as `clip_grad_norm_` does for one."""
    square_M = torch.stack([gradient.flatten(1).square().sum(1) for gradient in gradients]).sum(0)
    factor_M = (limit / (square_M.sqrt() + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factor_M.view(-1, *(1,) * (gradient.ndim - 1)))


def _rows(weights: Weights) -> Tensor:
    return torch.cat([weight.flatten(1) for weight in weights.values()], 1)


def _split(rows: Tensor, like: Weights) -> Weights:
    """The inverse of `_rows`; `like` has the shapes."""
    parts = rows.split([weight[0].numel() for weight in like.values()], 1)
    return {name: part.reshape(-1, *like[name].shape[1:]) for name, part in zip(like, parts, strict=True)}


def _flat(weights: Weights) -> np.ndarray:
    return torch.cat([weight.flatten() for weight in weights.values()]).numpy().copy()


def _grad(weight: Tensor) -> Tensor:
    assert weight.grad is not None
    return weight.grad
