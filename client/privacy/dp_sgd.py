# ruff: noqa: N803, N806
"""DP-SGD on one site.

Each step takes every unit (image or person) with probability q, clips each unit's gradient to C, adds Gaussian noise of
deviation sigma C to the sum and divides by a public constant (Abadi et al., arXiv 1607.00133, algorithm 1). Nothing in
the step depends on how many units there are. K noise draws of one unit are folded into the token axis, so the unit's
gradient is that of their mean and clipping acts once.

The round is a total function of the units. A micro-batch has one shape, whatever is in it, and runs once on blank
images before the first unit is read; one that raises is done again unit by unit; a unit that still raises, or whose
gradient is not finite, counts as zero. What is left to fail does not depend on the units. Numbers too small for
float32's usual precision are zero, so that none makes a step slow.

One unit more or less moves the sum by at most C, rounding included, for whatever weights:

* What a unit adds depends on nothing but the unit and its draws. A network may be made to blow up the last bits of its
  numbers, and those could depend on a unit's place in a micro-batch or on its neighbours. Whether they do is tried on
  random weights before the first unit is read (`rehearse`); where they do, each unit has a micro-batch of its own.
* Units come in a secret random order. Take one away and put the last one in its place: that is a random order again,
  so two micro-batches differ and all others are the same, bit by bit.
* In these two, float32 is off by at most 2.5e-4 C in all and a norm by 1.3e-4 of itself (`clipping`); float64, in which
  micro-batches are added, by less than 1e-6 C for 10^9 units times micro-batches. Clipping to `MARGIN` of C covers
  that, and the rounding to the grid.

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
from client.privacy.arithmetic import is_place_alike, tiny_as_zero
from client.privacy.clipping import Sums, clipped_gradients, position_gradients, sum_clipped, unit_gradients, validate
from client.privacy.grid_noise import add_noise, clipping_bound, grid_exponent
from client.privacy.randomness.keystream import Keystream
from client.privacy.randomness.secret_random import SecretRandom, secret_streams
from shared.diffusion.losses import Draw, draw_noise, per_unit_loss
from shared.diffusion.schedule import make_schedule
from shared.diffusion.uvit import Positions
from shared.experiment.config import Experiment
from shared.experiment.learning_rate import round_lr
from shared.seeding import Streams
from shared.training.optimizer import make_optimizer, set_lr

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
    optimizer: torch.optim.Optimizer | None = None,
    lr: Callable[[int], float] | None = None,
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
        optimizer: of the model; default: a new one. Its moments may be made of noised gradients that were charged.
        lr: learning rate of each 0-based step; default: that of a run's first round.
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
    optimizer, lr = optimizer or make_optimizer(model, experiment.optim), lr or round_lr(experiment, 1)
    with tiny_as_zero():
        step.rehearse()
        for number in range(experiment.federation.local_steps):
            set_lr(optimizer, lr(number))
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
        # In multiples of the grid.
        self.total = torch.zeros(sum(sizes), dtype=torch.float64, device=device)
        self.parts = torch.split(self.total, sizes)

    def rehearse(self) -> None:
        """Try the arithmetic on blank images before the first unit is read; claims memory of the largest pass, too."""
        draws = [self._draw(SecretRandom(bytes([number]) * 32, self.device)) for number in range(3)]
        if not is_place_alike(self.model, self.slots, self._unit_gradients, *draws):
            log.warning("this machine's numbers depend on a unit's place in a micro-batch: one unit at a time, slowly")
            self.slots = 1
            draws = [self._draw(SecretRandom(bytes(32), self.device))]
        self._add(self._blank(), self._nobody(), draws[0])

    def take(self, images: ImageReader, units: Sequence[Ids], streams: Streams) -> None:
        """Leave the noised mean gradient of a Poisson sample of the units in `.grad`.

        Args:
            images: source of image batches.
            units: image numbers of each unit.
            streams: secret, for this step alone.
        """
        privacy = self.experiment.privacy
        random = SecretRandom(streams.key("units"))
        chosen = random.shuffled(random.sample(len(units), privacy.sample_rate)).tolist()
        choices = SecretRandom(streams.key("images"))
        draws = SecretRandom(streams.key("draws"), self.device)
        for start in range(0, len(chosen), self.slots):
            some = [units[unit] for unit in chosen[start : start + self.slots]]
            self.add(images, choose_images(some, self.experiment, choices), self._draw(draws))
        add_noise(self.total.round_(), self.deviation, Keystream(streams.key("noise"), self.device))
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
        """Add the clipped gradients of the present rows, or raise and change nothing."""
        sums = self._clipped(images.to(self.device), is_present_B.to(self.device), draw)
        gradients = [sums[parameter] for parameter in self.parameters]
        if not bool(torch.stack([each.isfinite().all() for each in gradients]).all()):
            raise ArithmeticError("a sum of clipped gradients is not finite")
        for part, gradient in zip(self.parts, gradients, strict=True):
            part.add_(gradient.flatten(), alpha=1 / self.grid)

    def _clipped(self, images: Tensor, is_present_B: Tensor, draw: Draw) -> Sums:
        if self.experiment.privacy.clipping == "fast":
            return clipped_gradients(self.model, lambda: self._loss(images, draw), self.bound, is_present_B)[1]
        return sum_clipped(self.model, self._hooked(images, draw), self.bound, is_present_B)

    def _unit_gradients(self, draw: Draw) -> Iterator[Tensor]:
        """Of a micro-batch of blank images, for one trainable tensor after the other, as they are clipped and added."""
        blank = self._blank().to(self.device)
        if self.experiment.privacy.clipping == "fast":
            return unit_gradients(self.model, lambda: self._loss(blank, draw))
        return iter(self._hooked(blank, draw).values())

    def _loss(self, images: Tensor, draw: Draw) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            return self.loss(self.model, self.schedule, self.experiment, images, *draw)

    def _hooked(self, images: Tensor, draw: Draw) -> dict[nn.Parameter, Tensor]:
        """Opacus' gradients of all units."""
        with _hooks(self.model):
            loss_B = self._loss(images, draw)
            assert loss_B.shape == (self.slots,)
            torch.autograd.backward(loss_B.sum())
            return {parameter: parameter.grad_sample for parameter in self.parameters}  # type: ignore[attr-defined]

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
