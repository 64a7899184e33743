# ruff: noqa: N803, N806
"""DP-SGD on one site.

Each step takes every unit (image or person) with probability q, clips each unit's gradient to C, adds Gaussian noise of
deviation sigma C to the sum and divides by a public constant (Abadi et al., arXiv 1607.00133, algorithm 1). Nothing in
the step depends on how many units there are. K noise draws of one unit are folded into the token axis, so the unit's
gradient is that of their mean and clipping acts once.

The round is a total function of the units. A micro-batch has one shape, whatever is in it, and runs once on blank
images before the first unit is read; one that raises is done again unit by unit; a unit that still raises, or whose
gradient is not finite, counts as zero. What is left to fail does not depend on the units.

Shapes: B units of a micro-batch, K draws per unit, C channels, H W pixels, L tokens, D width.
"""

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from opacus.grad_sample import GradSampleHooks, register_grad_sampler
from torch import Tensor, nn

from client.data.units import Ids, ImageReader, Shown, choose_images, read_images
from client.privacy.clipping import clipped_gradients, position_gradients, sum_clipped, validate
from client.privacy.grid_noise import add_noise, clipping_bound, grid_exponent
from client.privacy.keystream import Keystream
from client.privacy.secret_random import SecretRandom, secret_streams
from shared.diffusion.losses import Draw, draw_noise, per_unit_loss
from shared.diffusion.schedule import make_schedule
from shared.diffusion.uvit import Positions
from shared.experiment.config import Experiment
from shared.seeding import Streams
from shared.training.optimizer import lr_at, make_optimizer, set_lr

log = logging.getLogger("maskfed.client")
PARTS = 4
"""Micro-batches that an expected batch makes at least: the last one of a batch is half empty on average."""


@register_grad_sampler(Positions)  # type: ignore[untyped-decorator]
def _sample_positions(layer: Positions, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    return {layer.weight: position_gradients(layer, activations[1], backprops)}


def train_private(
    model: nn.Module,
    experiment: Experiment,
    images: ImageReader,
    units: Sequence[Ids],
    *,
    device: torch.device,
    precision: str = "float32",
    loss: Callable[..., Tensor] = per_unit_loss,
    after_noise: Callable[[], None] = lambda: None,
    on_step: Callable[[int], None] = lambda _: None,
) -> None:
    """Run the steps of one round in place; the ledger has reserved them before.

    Args:
        model: on `device`; only tensors that require a gradient change.
        experiment: constants of `privacy`, `federation.local_steps`, optimizer and loss.
        images: source of image batches.
        units: image numbers of each unit of privacy.
        device: where the model is.
        precision: of the forward and backward pass.
        loss: losses (B,) of a micro-batch; takes what `per_unit_loss` takes.
        after_noise: called on the noised gradients before the optimizer reads them (a data-independent term).
        on_step: called with the 0-based number of each finished step.

    Raises:
        InputError: a network or constants for which the guarantee does not hold.
    """
    validate(model)
    model.train()
    # Never a seed that anybody else knows: who can repeat the noise can subtract it.
    streams = secret_streams()
    step = PrivateStep(model, experiment, device, precision, loss)
    optimizer = make_optimizer(model, experiment.optim)
    step.rehearse()
    for number in range(experiment.federation.local_steps):
        set_lr(optimizer, lr_at(number, experiment.optim))
        step.take(images, units, streams.child(number))
        after_noise()
        optimizer.step()
        on_step(number)
    optimizer.zero_grad(set_to_none=True)


class PrivateStep:
    """One step at a time: the noised mean of clipped gradients, by `fast` clipping or by Opacus' `hooks`.

    `fast` needs little memory; `hooks` keep every unit's gradient of a micro-batch.
    """

    def __init__(
        self,
        model: nn.Module,
        experiment: Experiment,
        device: torch.device,
        precision: str,
        loss: Callable[..., Tensor] = per_unit_loss,
    ) -> None:
        self.model, self.experiment, self.device, self.precision = model, experiment, device, precision
        self.loss = loss
        self.schedule = make_schedule(experiment.diffusion.schedule, experiment.diffusion.timesteps).to(device)
        privacy = experiment.privacy
        self.slots = min(privacy.micro_batch, math.ceil(privacy.expected_batch / PARTS))
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        sizes = [parameter.numel() for parameter in self.parameters]
        self.bound = clipping_bound(privacy, sum(sizes))
        exponent = grid_exponent(privacy.noise_multiplier)
        self.grid, self.deviation = privacy.max_grad_norm / 2.0**exponent, privacy.noise_multiplier * 2.0**exponent
        # Whole multiples of the grid, so that micro-batches add up without rounding.
        self.total = torch.zeros(sum(sizes), dtype=torch.float64, device=device)
        self.parts = torch.split(self.total, sizes)

    def rehearse(self) -> None:
        """Add a micro-batch without units: memory of the largest pass is claimed before the first image is read."""
        self._add(self._blank(), self._nobody(), self._draw(SecretRandom(bytes(32), self.device)))

    def take(self, images: ImageReader, units: Sequence[Ids], streams: Streams) -> None:
        """Leave the noised mean gradient of a Poisson sample of the units in `.grad`.

        Args:
            images: source of image batches.
            units: image numbers of each unit.
            streams: secret, for this step alone.
        """
        privacy = self.experiment.privacy
        chosen = SecretRandom(streams.key("units")).sample(len(units), privacy.sample_rate).tolist()
        choices = SecretRandom(streams.key("images"))
        draws = SecretRandom(streams.key("draws"), self.device)
        for start in range(0, len(chosen), self.slots):
            shown = choose_images(
                [units[unit] for unit in chosen[start : start + self.slots]], self.experiment, choices
            )
            self.add(images, shown, self._draw(draws))
        add_noise(self.total, self.deviation, Keystream(streams.key("noise"), self.device))
        for parameter, part in zip(self.parameters, self.parts, strict=True):
            parameter.grad = part.mul(self.grid / privacy.expected_batch).to(parameter.dtype).view_as(parameter)
        self.total.zero_()

    def add(self, images: ImageReader, shown: Shown, draw: Draw) -> None:
        """Add the clipped gradients of a micro-batch of at most `slots` units; never raises for what a unit is."""
        count = len(shown.ids_BK)
        batch, is_present = self._blank(), self._nobody()
        is_present[:count] = True
        try:
            batch[:count] = read_images(images, shown, self.experiment.privacy.draws)
            self._add(batch, is_present, draw)
        except Exception as error:
            log.warning("a micro-batch is done again unit by unit", exc_info=error)
            for place in range(count):
                self._add_alone(images, shown.unit(place), place, draw)

    def _add_alone(self, images: ImageReader, shown: Shown, place: int, draw: Draw) -> None:
        batch, is_present = self._blank(), self._nobody()
        is_present[place] = True
        try:
            batch[place : place + 1] = read_images(images, shown, self.experiment.privacy.draws)
            self._add(batch, is_present, draw)
        except Exception as error:
            log.warning("a unit counts as zero: its gradient cannot be computed", exc_info=error)

    def _add(self, images: Tensor, is_present_B: Tensor, draw: Draw) -> None:
        """Add the clipped gradients of the present rows, rounded to the grid, or raise and change nothing."""
        images, is_present_B = images.to(self.device), is_present_B.to(self.device)

        def loss() -> Tensor:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
                return self.loss(self.model, self.schedule, self.experiment, images, *draw)

        if self.experiment.privacy.clipping == "fast":
            clipped_gradients(self.model, loss, self.bound, is_present_B)
        else:
            with _hooks(self.model):
                loss_B = loss()
                assert loss_B.shape == is_present_B.shape
                torch.autograd.backward(loss_B.sum())
                per_unit = {parameter: parameter.grad_sample for parameter in self.parameters}  # type: ignore[attr-defined]
                sum_clipped(self.model, per_unit, self.bound, is_present_B)
        gradients = [_gradient(parameter) for parameter in self.parameters]
        if not bool(torch.stack([each.isfinite().all() for each in gradients]).all()):
            raise ArithmeticError("a sum of clipped gradients is not finite")
        for part, gradient in zip(self.parts, gradients, strict=True):
            part.add_(gradient.flatten().double().mul_(1 / self.grid).round_())

    def _blank(self) -> Tensor:
        size = self.experiment.model.image_size
        return torch.zeros(self.slots, self.experiment.privacy.draws, 3, size, size, dtype=torch.uint8)

    def _nobody(self) -> Tensor:
        return torch.zeros(self.slots, dtype=torch.bool)

    def _draw(self, random: SecretRandom) -> Draw:
        return draw_noise(self.experiment, self.slots * self.experiment.privacy.draws, random)


@contextmanager
def _hooks(model: nn.Module) -> Iterator[None]:
    """Opacus' per-unit gradients, with nothing left of them afterwards, also when the block raises."""
    hooks = GradSampleHooks(model, loss_reduction="sum")
    try:
        with warnings.catch_warnings():
            # The first layer's input is data and needs no gradient; its hook then sees output gradients, as it should.
            warnings.filterwarnings("ignore", "Full backward hook is firing")
            yield
    finally:
        hooks.cleanup()
        for module in model.modules():
            for left in ("activations", "max_batch_len"):
                module.__dict__.pop(left, None)


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
