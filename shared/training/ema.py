"""Exponential moving average of the weights; samples are drawn from it."""

from typing import Literal

import torch
from torch import Tensor, nn

from shared.errors import InputError
from shared.experiment.sections import OptimConfig

_COPIED_STEPS, _POWER = 100, 2 / 3
"""Of ema_pytorch's warm-up, as the authors leave them."""


def ema_decay_at(step: int, decay: float, warmup: Literal["ratio", "power"] = "ratio") -> float:
    """Decay of 0-based `step`: without a warm-up the random start lingers for 1 / (1 - decay) steps.

    `ratio`: min(decay, (1 + step) / (10 + step)). `power`: 0 up to step 100, then min(decay, 1 - (step - 99)^(-2/3)),
    as ema_pytorch's `get_current_decay` has it (github.com/lucidrains/ema-pytorch).
    """
    if warmup == "ratio":
        return min(decay, (1 + step) / (10 + step))
    return 0.0 if step <= _COPIED_STEPS else min(decay, 1 - (step + 1 - _COPIED_STEPS) ** -_POWER)


class Ema:
    """Averages the parameters of one model, on the model's device, in one fused call per update.

    Attributes:
        config: limit of the decay, its warm-up, and how often the average is updated.
        step: optimizer steps done so far; it drives the warm-up and belongs into a checkpoint.
    """

    def __init__(self, model: nn.Module, config: OptimConfig) -> None:
        self.config, self.step = config, 0
        self._names = [name for name, _ in model.named_parameters()]
        self._live: list[Tensor] = [parameter for _, parameter in model.named_parameters()]
        self._mean = [parameter.detach().clone() for parameter in self._live]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the model where its turn has come; call once per optimizer step."""
        if self.step % self.config.ema_every == 0:
            decay = ema_decay_at(self.step, self.config.ema_decay, self.config.ema_warmup)
            torch._foreach_lerp_(self._mean, self._live, 1 - decay)
        self.step += 1

    def state(self) -> dict[str, Tensor]:
        """The averaged tensors by parameter name; views, not copies."""
        return dict(zip(self._names, self._mean, strict=True))

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor], step: int) -> None:
        """Continue from a stored average.

        Raises:
            InputError: names or shapes are not those of the model.
        """
        if missing := set(self._names) ^ set(state):
            raise InputError(f"averaged weights: {min(missing)!r} is on one side only: give a matching checkpoint")
        for name, mean in zip(self._names, self._mean, strict=True):
            if mean.shape != state[name].shape:
                raise InputError(
                    f"averaged weights: {name!r} has shape {tuple(state[name].shape)} where the model has "
                    f"{tuple(mean.shape)}: give a matching checkpoint"
                )
            mean.copy_(state[name])
        self.step = step

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the parameters of `model`, for example a second one that draws samples."""
        torch._foreach_copy_([parameter for _, parameter in model.named_parameters()], self._mean)
