"""The training loop, for the coordinator and for sites: one process or many, exact resume, nothing non-finite applied.

All randomness of a step derives from (stream, step, rank, micro-batch), so a resumed run needs no generator state.
Shapes: B images of one micro-batch, C channels, H W pixels.
"""
# ruff: noqa: N803, N806 - shape suffixes

import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from shared.data.image_set import DataOrder, Images
from shared.diffusion.losses import draw_noise, per_image_loss
from shared.diffusion.schedule import make_schedule
from shared.experiment.config import Experiment
from shared.experiment.learning_rate import lr_at
from shared.seeding import Streams
from shared.training.compiling import should_compile
from shared.training.ema import Ema
from shared.training.finite_check import FiniteCheck, NonFiniteLossError, StepResult
from shared.training.optimizer import load_moments, make_optimizer, moments_of, set_lr
from shared.training.precision import Precision, decide_precision
from shared.training.processes import World
from shared.training.weights import Arrays, load_weights, to_numpy
from shared.updates.trainable import select_trainable

__all__ = ["Engine", "NonFiniteLossError", "Precision", "StepResult", "decide_precision", "run_training"]


class Engine:
    """A network with its optimizer, averages and streams, trained one step at a time.

    Attributes:
        model: the network itself, without wrappers.
        ema: its moving average, where one is wanted.
        steps_done: optimizer steps so far.
        finite_check: stops the training before a step that is not finite.
        precision: the format of activations; weights and optimizer are always float32.
    """

    def __init__(
        self,
        experiment: Experiment,
        model: nn.Module,
        streams: Streams,
        world: World | None = None,
        *,
        trainable: Iterable[str] = ("*",),
        proximal_mu: float = 0.0,
        lr: Callable[[int], float] | None = None,
        is_averaged: bool = True,
    ) -> None:
        """Prepare training of `model`, which moves to the world's device.

        Args:
            experiment: the stage; sections train, model, mask, diffusion, data and optim are used.
            model: initialised network.
            streams: root of data order, noise, masks and flips; secret at a site.
            world: this process among others; default: alone, on the model's device.
            trainable: patterns of `shared.updates.trainable`; other tensors stay frozen.
            proximal_mu: FedProx: adds mu / 2 * ||w - w_0||^2 (arXiv 1812.06127, Eq. 2), w_0 being the weights of now.
            lr: learning rate of each 0-based step; default: the experiment's.
            is_averaged: whether anybody will ask for the moving average; checkpoints hold it.

        Raises:
            InputError: a pattern that matches nothing, or a batch that cannot be split.
        """
        self.experiment, self.streams = experiment, streams
        self.world = world or World(device=next(model.parameters()).device)
        self.device = self.world.device
        self.images_per_step = self.world.split(experiment.train.batch, experiment.train.accumulation)
        self.precision: Precision = decide_precision(experiment, self.device)
        self.model = model.to(self.device).train()
        chosen = set(select_trainable([name for name, _ in model.named_parameters()], trainable))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in chosen)
        self._trained = {name: parameter for name, parameter in model.named_parameters() if name in chosen}
        self._anchor = [parameter.detach().clone() for parameter in self._trained.values()] if proximal_mu else []
        self._proximal_mu, self._lr = proximal_mu, lr or (lambda step: lr_at(step, experiment.optim))
        self._schedule = make_schedule(experiment.diffusion.schedule, experiment.diffusion.timesteps).to(self.device)
        self.optimizer = make_optimizer(model, experiment.optim)
        self._ema = Ema(model, experiment.optim) if is_averaged else None
        self.steps_done = 0
        self.finite_check = FiniteCheck(self.device)
        if should_compile(experiment, self.device):
            model.compile(dynamic=False)
        self._network = self._distributed(model) if self.world.size > 1 else model

    @property
    def ema(self) -> Ema:
        """The moving average of an engine that has one."""
        assert self._ema is not None, "this engine was made without a moving average"
        return self._ema

    def step(self, images_BCHW: Tensor) -> StepResult:
        """One optimizer step on this process's uint8 images (B, 3, H, W), split into the micro-batches.

        Raises:
            NonFiniteLossError: before anything is applied; on a GPU up to two calls later, so as not to wait, with the
                step and those after it skipped on the device.
        """
        self.optimizer.zero_grad(set_to_none=True)
        set_lr(self.optimizer, self._lr(self.steps_done))
        count = self.experiment.train.accumulation
        losses = [self._backward(part, number, count) for number, part in enumerate(images_BCHW.tensor_split(count))]
        loss = torch.stack(losses).mean()
        if self.world.size > 1:
            dist.all_reduce(loss)
            loss /= self.world.size
        if self._proximal_mu:
            self._pull_to_anchor()
        result = StepResult(loss, self._clip())
        self._apply(result)
        return result

    def groups(self) -> dict[str, Arrays]:
        """Checkpoint groups `model`, `ema` and `optimizer`; on a CPU the arrays are views of the live tensors."""
        self.finite_check.settle()
        state = {name: to_numpy(tensor) for name, tensor in self.model.state_dict().items()}
        averaged = {name: to_numpy(tensor) for name, tensor in self.ema.state().items()}
        moments = {"steps_done": np.array(self.steps_done, np.int64), **moments_of(self.optimizer, self._trained)}
        return {"model": state, "ema": {**state, **averaged}, "optimizer": moments}

    def load_groups(self, groups: dict[str, Arrays]) -> None:
        """Continue exactly where `groups()` was called.

        Raises:
            InputError: the tensors are not those of this network.
        """
        load_weights(self.model, groups["model"])
        self.steps_done = int(groups["optimizer"]["steps_done"])
        names = {name for name, _ in self.model.named_parameters()}
        averaged = {name: torch.from_numpy(array) for name, array in groups["ema"].items() if name in names}
        self.ema.load_state(averaged, self.steps_done)
        load_moments(self.optimizer, self._trained, groups["optimizer"], self.steps_done)

    def _backward(self, images_BCHW: Tensor, micro_batch: int, count: int) -> Tensor:
        images_BCHW = images_BCHW.to(self.device, non_blocking=True)
        random = self.streams.generator("noise", self.steps_done, self.world.rank, micro_batch, device=self.device)
        if self.experiment.data.horizontal_flip:
            images_BCHW = flip_half(images_BCHW, random)
        draw = draw_noise(self.experiment, len(images_BCHW), random)
        # Gradients are summed over processes once, with the last micro-batch.
        last = micro_batch == count - 1
        with self._without_sync() if not last else nullcontext():
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
                loss_B = per_image_loss(self._network, self._schedule, self.experiment, images_BCHW, *draw)
            loss = loss_B.mean()
            torch.autograd.backward(loss / count)
        return loss.detach()

    def _clip(self) -> Tensor:
        parameters = list(self._trained.values())
        limit = self.experiment.optim.grad_clip or math.inf
        return nn.utils.clip_grad_norm_(parameters, limit, foreach=True)

    def _apply(self, result: StepResult) -> None:
        skip = self.finite_check.admit(result, self.steps_done + 1)
        if skip is not None:
            self.optimizer.found_inf = skip  # type: ignore[attr-defined]
        self.optimizer.step()
        if self._ema is not None:
            self._ema.update()
        self.steps_done += 1

    def _pull_to_anchor(self) -> None:
        parameters = list(self._trained.values())
        pulls = torch._foreach_sub([parameter.detach() for parameter in parameters], self._anchor)
        torch._foreach_add_([_gradient(parameter) for parameter in parameters], pulls, alpha=self._proximal_mu)

    def _distributed(self, model: nn.Module) -> DistributedDataParallel:
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, devices, broadcast_buffers=False, gradient_as_bucket_view=True)

    def _without_sync(self) -> AbstractContextManager[None]:
        return self._network.no_sync() if isinstance(self._network, DistributedDataParallel) else nullcontext()


def run_training(
    engine: Engine,
    images: Images,
    *,
    steps: int,
    on_step: Callable[[int, StepResult], bool | None] | None = None,
) -> int:
    """Train from `engine.steps_done` until `steps` steps are done; the next batch is read while a step runs.

    Args:
        engine: prepared, or resumed by `load_groups`.
        images: all images; every process reads its share of each batch.
        steps: optimizer steps in all.
        on_step: told steps done and the result; returning True ends the training after this step, and must come at
            the same step in every process.

    Returns:
        Steps done.

    Raises:
        NonFiniteLossError: loss or gradient was not finite; nothing of that step was applied.
    """
    world = engine.world
    order = DataOrder(len(images), engine.experiment.train.batch, engine.streams)

    def read(step: int) -> Tensor:
        batch = images.batch(order.ids(step, world.rank, world.size))
        return batch.pin_memory() if engine.device.type == "cuda" and batch.device.type == "cpu" else batch

    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(read, engine.steps_done)
        while engine.steps_done < steps:
            batch = ahead.result()
            ahead = reader.submit(read, engine.steps_done + 1)
            result = engine.step(batch)
            if on_step and on_step(engine.steps_done, result):
                break
    engine.finite_check.settle()
    return engine.steps_done


def flip_half(images_BCHW: Tensor, random: torch.Generator) -> Tensor:
    """Each image mirrored left to right with probability one half, on its device."""
    chosen_B = torch.rand(len(images_BCHW), generator=random, device=random.device) < 0.5
    return torch.where(chosen_B[:, None, None, None], images_BCHW.flip(-1), images_BCHW)


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
