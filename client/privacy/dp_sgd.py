# ruff: noqa: N806
"""DP-SGD on one site.

Each step takes every unit (image or person) with probability q, clips each unit's gradient to C, adds Gaussian noise of
deviation sigma C to the sum and divides by a public constant (Abadi et al., arXiv 1607.00133, algorithm 1). Nothing in
the step depends on how many units there are. K noise draws of one unit are folded into the token axis, so the unit's
gradient is that of their mean and clipping acts once.

Shapes: B units of a micro-batch, K draws per unit, C channels, H W pixels, L tokens, D width.
"""

import warnings
from collections.abc import Callable, Sequence

import torch
from opacus.grad_sample import GradSampleHooks, register_grad_sampler
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from torch import Tensor, nn

from client.data.units import Ids, Images, load_units, secret_generator
from client.privacy.clipping import clipped_gradients, position_gradients, validate
from shared.diffusion.losses import draw_noise, per_image_loss
from shared.diffusion.schedule import make_schedule
from shared.diffusion.uvit import Positions
from shared.experiment.config import Experiment
from shared.training.optimizer import lr_at, make_optimizer, set_lr

MARGINS = {"float32": 0.999, "bfloat16": 0.98}
"""Share of C that gradients are clipped to while the noise is set for C: rounding must not lift a norm above C."""


@register_grad_sampler(Positions)  # type: ignore[untyped-decorator]
def _sample_positions(layer: Positions, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    return {layer.weight: position_gradients(layer, activations[1], backprops)}


def train_private(
    model: nn.Module,
    experiment: Experiment,
    images: Images,
    units: Sequence[Ids],
    *,
    device: torch.device,
    precision: str = "float32",
    loss: Callable[..., Tensor] = per_image_loss,
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
        loss: losses (B,) of a micro-batch; takes what `per_image_loss` takes.
        after_noise: called on the noised gradients before the optimizer reads them (a data-independent term).
        on_step: called with the 0-based number of each finished step.
    """
    validate(model)
    privacy = experiment.privacy
    model.train()
    step = PrivateStep(model, experiment, device, precision, loss)
    # Never a seed that anybody else knows: who can repeat the noise can subtract it.
    pick, noise = secret_generator("cpu"), secret_generator(device)
    optimizer = step.optimizer(noise)
    try:
        for number in range(experiment.federation.local_steps):
            set_lr(optimizer.original_optimizer, lr_at(number, experiment.optim))
            chosen = (torch.rand(len(units), generator=pick, dtype=torch.float64) < privacy.sample_rate).nonzero()[:, 0]
            # An empty batch is one empty micro-batch: the step happens, adds noise and is counted.
            parts = torch.split(chosen, privacy.micro_batch)
            for part in parts:
                optimizer.signal_skip_step(do_skip=part is not parts[-1])
                optimizer.zero_grad()
                batch = load_units(images, [units[int(unit)] for unit in part], experiment, pick, device)
                step.backward(batch, noise)
                if optimizer.pre_step():
                    after_noise()
                    optimizer.original_optimizer.step()
            on_step(number)
    finally:
        step.close()
        optimizer.zero_grad(set_to_none=True)


class PrivateStep:
    """The two ways to clip: `fast` with flat memory, Opacus' `hooks` keeping every unit's gradient of a micro-batch."""

    def __init__(
        self,
        model: nn.Module,
        experiment: Experiment,
        device: torch.device,
        precision: str,
        loss: Callable[..., Tensor] = per_image_loss,
    ) -> None:
        self.model, self.experiment, self.device, self.precision = model, experiment, device, precision
        self.loss = loss
        self.schedule = make_schedule(experiment.diffusion.schedule, experiment.diffusion.timesteps).to(device)
        self.is_fast = experiment.privacy.clipping == "fast"
        # Fast clipping measures and sums in float32 whatever the precision; hooks do it in that of the backward pass.
        self.bound = MARGINS["float32" if self.is_fast else precision] * experiment.privacy.max_grad_norm
        self.hooks = None if self.is_fast else GradSampleHooks(model, loss_reduction="sum")

    def optimizer(self, noise: torch.Generator) -> DPOptimizer:
        """AdamW behind Opacus' noise; the noise is set for C, clipping is tighter by the margin."""
        privacy = self.experiment.privacy
        # loss_reduction "mean" only divides the noised sum by the public normaliser.
        kind = DPOptimizerFastGradientClipping if self.is_fast else _MarginOptimizer
        optimizer = kind(
            make_optimizer(self.model, self.experiment.optim),
            noise_multiplier=privacy.noise_multiplier,
            max_grad_norm=privacy.max_grad_norm,
            expected_batch_size=privacy.expected_batch,
            loss_reduction="mean",
            generator=noise,
        )
        if isinstance(optimizer, _MarginOptimizer):
            optimizer.clip_norm = self.bound
        return optimizer

    def backward(self, images: Tensor, generator: torch.Generator) -> None:
        """Leave the clipped gradients of a micro-batch where the optimizer of this kind collects them."""
        draw = draw_noise(self.experiment, len(images), generator, self.experiment.privacy.draws)

        def loss() -> Tensor:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
                return self.loss(self.model, self.schedule, self.experiment, images, *draw)

        if self.is_fast:
            clipped_gradients(self.model, loss, self.bound)
            return
        loss_B = loss()
        assert loss_B.shape == (len(images),)
        with warnings.catch_warnings():
            # The first layer's input is data and needs no gradient; its hook then sees output gradients, as it should.
            warnings.filterwarnings("ignore", "Full backward hook is firing")
            torch.autograd.backward(loss_B.sum())

    def close(self) -> None:
        """Take Opacus' hooks off the model again."""
        if self.hooks is not None:
            self.hooks.cleanup()


class _MarginOptimizer(DPOptimizer):  # type: ignore[misc]
    """Clips to `clip_norm`, adds noise for `max_grad_norm`."""

    clip_norm: float
    max_grad_norm: float

    def clip_and_accumulate(self) -> None:
        """Opacus' clipping at the tighter bound."""
        noise_norm, self.max_grad_norm = self.max_grad_norm, self.clip_norm
        try:
            super().clip_and_accumulate()
        finally:
            self.max_grad_norm = noise_norm
