"""Loss and gradient norm of a step: checked before it is applied, without stalling a GPU."""

import math
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

# Steps that a GPU may be behind when the figures of the oldest are waited for.
STEPS_AHEAD = 2


class NonFiniteLossError(ArithmeticError):
    """Loss or gradient was not finite; neither that step nor a later one was applied."""


@dataclass(frozen=True)
class StepResult:
    """Figures of one optimizer step; on a GPU reading one waits for the step."""

    loss_tensor: Tensor
    grad_norm_tensor: Tensor

    @property
    def loss(self) -> float:
        """Mean loss over all processes and micro-batches, without the proximal term."""
        return float(self.loss_tensor)

    @property
    def grad_norm(self) -> float:
        """L2 norm of the whole gradient before clipping."""
        return float(self.grad_norm_tensor)


class FiniteCheck:
    """Stops a training at the first figure that is not finite.

    On a CPU `admit` raises at once. On a GPU it returns a flag for the optimizer, whose fused kernel leaves everything
    as it is where the flag is set; once set it stays, so no later step is applied before the host has noticed.
    """

    def __init__(self, device: torch.device, *, defer: bool | None = None) -> None:
        """Watch trainings on `device`; `defer` overrides the choice between raising at once and by flag."""
        self._is_cuda = device.type == "cuda"
        self._defers = self._is_cuda if defer is None else defer
        self._flag = torch.zeros((), device=device)
        self._pending: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def admit(self, result: StepResult, step: int) -> Tensor | None:
        """Check 1-based `step` before it is applied.

        Returns:
            None: apply it; otherwise a float flag on the device: 1 skips it.

        Raises:
            NonFiniteLossError: this step is not finite, or on a GPU an earlier one was not.
        """
        if not self._defers:
            raise_unless_finite(step, result.loss, result.grad_norm)
            return None
        while len(self._pending) >= STEPS_AHEAD:
            self._check_oldest()
        figures = torch.stack([result.loss_tensor.detach(), result.grad_norm_tensor])
        self._flag = torch.maximum(self._flag, (~figures.isfinite()).any().float())
        on_host = figures.to("cpu", non_blocking=True)
        event = torch.cuda.Event() if self._is_cuda else None  # type: ignore[no-untyped-call]
        if event:
            event.record()
        self._pending.append((step, on_host, event))
        return self._flag

    def settle(self) -> None:
        """Wait for all steps; call before weights are used elsewhere.

        Raises:
            NonFiniteLossError: one was not finite.
        """
        while self._pending:
            self._check_oldest()

    def _check_oldest(self) -> None:
        step, figures, event = self._pending.popleft()
        if event:
            event.synchronize()
        raise_unless_finite(step, *figures.tolist())


def raise_unless_finite(step: int, loss: float, grad_norm: float) -> None:
    """Check the figures of one step.

    Raises:
        NonFiniteLossError: one is not finite; the line says what to try.
    """
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise NonFiniteLossError(
            f"step {step}: loss {loss}, gradient norm {grad_norm}; it was not applied: "
            "lower optim.lr, raise optim.warmup_steps or train in float32"
        )
