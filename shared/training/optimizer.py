"""AdamW as the paper's training uses it; or Muon for the matrices of the blocks, beside it.

Shapes: A rows and B columns of a matrix.
"""
# ruff: noqa: N803 - shape suffixes

import inspect
from collections.abc import Callable, Mapping
from typing import Any, overload

import torch
from torch import Tensor, nn

from shared.diffusion.uvit import Positions
from shared.experiment.sections import OptimConfig
from shared.training.weights import Arrays, to_numpy
from shared.updates.trainable import is_hidden_matrix

MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")


NEWTON_SCHULZ, ITERATIONS, MOMENTUM, LENGTH, TINY = (3.4445, -4.775, 2.0315), 5, 0.95, 0.2, 1e-7
"""Coefficients and number of the iterations, momentum and the root mean square of a step, as in `torch.optim.Muon`."""


class EagerAdamW(torch.optim.AdamW):
    """AdamW as it is without `torch.compile`, which no optimizer here goes through.

    The decorators of torch's own methods load the compiler when they are first called, for nothing.
    """

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for some matrices and AdamW for the rest, if any, as one optimizer.

    Muon (arXiv 2502.16982, Eq. 2 and 4) makes each matrix of momenta orthogonal, with the root mean square that a step
    of AdamW has: both take one learning rate. `torch.optim.Muon` does the same, but in bfloat16 alone, which takes 17
    times as long as float32 on a CPU without units for it.
    """

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)

    def __init__(self, matrices: list[nn.Parameter], adamw: list[EagerAdamW], config: OptimConfig) -> None:
        self._adamw = adamw
        muon = {"params": matrices, "lr": config.lr, "weight_decay": config.weight_decay}
        # The groups are shared, so that a learning rate reaches both, and so is the state: no parameter is of both.
        super().__init__([*(group for part in adamw for group in part.param_groups), muon], {})
        self._share()

    def _share(self) -> None:
        groups = iter(self.param_groups)
        for part in self._adamw:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of every optimizer; it makes groups and state anew."""
        super().load_state_dict(state_dict)
        self._share()

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of both; where `found_inf` is set neither changes anything, for which the device is waited for."""
        loss = closure() if closure else None
        skip: Tensor | None = getattr(self, "found_inf", None)
        if skip is None or not bool(skip):
            for part in self._adamw:
                part.step()
            self._step_matrices(self.param_groups[-1])
        return loss

    def _step_matrices(self, group: dict[str, Any]) -> None:
        for matrix in group["params"]:
            if matrix.grad is None:
                continue
            momentum = self.state[matrix].setdefault("momentum_buffer", torch.zeros_like(matrix))
            momentum.lerp_(matrix.grad, 1 - MOMENTUM)
            matrix.mul_(1 - group["lr"] * group["weight_decay"])
            step = orthogonal(matrix.grad.lerp(momentum, MOMENTUM))
            matrix.sub_(step, alpha=group["lr"] * LENGTH * max(matrix.shape) ** 0.5)


def orthogonal(matrix_AB: Tensor) -> Tensor:
    """The matrix with all singular values near 1, from 0.7 to 1.21, by Newton and Schulz's iteration, (A, B).

    In bfloat16 on a GPU, as `torch.optim.Muon`, else in float32.
    """
    if matrix_AB.shape[0] > matrix_AB.shape[1]:
        return orthogonal(matrix_AB.T).T
    a, b, c = NEWTON_SCHULZ
    x = matrix_AB.bfloat16() if matrix_AB.is_cuda else matrix_AB
    x = x / x.norm().clamp(min=TINY)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.to(matrix_AB.dtype)


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer of the trainable parameters: weight decay on matrices, none on positions, norms and biases.

    Where `decay_all` is set it is on these as well.
    """
    if config.optimizer == "adamw":
        return _adamw(model, config, [parameter for parameter in model.parameters() if parameter.requires_grad])
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    matrices = [parameter for name, parameter in named.items() if is_hidden_matrix(name, parameter.shape)]
    others = [parameter for name, parameter in named.items() if not is_hidden_matrix(name, parameter.shape)]
    adamw = [_adamw(model, config, others)] if others else []
    return MuonWithAdamW(matrices, adamw, config) if matrices else adamw[0]


def _adamw(model: nn.Module, config: OptimConfig, parameters: list[nn.Parameter]) -> EagerAdamW:
    """Fused on the CPU too, where it is several times faster than the loop and `foreach` is not."""
    plain = {id(module.weight) for module in model.modules() if isinstance(module, Positions)}
    is_plain = [not config.decay_all and (p.ndim < 2 or id(p) in plain) for p in parameters]
    groups = [
        {"params": [p for p, plain in zip(parameters, is_plain, strict=True) if plain == wanted], "weight_decay": decay}
        for wanted, decay in ((False, config.weight_decay), (True, 0.0))
    ]
    return EagerAdamW([group for group in groups if group["params"]], config.lr, config.betas, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group of `optimizer` the learning rate `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def moments_of(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> Arrays:
    """Moments of each parameter that has made a step, `<name>.exp_avg` and `<name>.exp_avg_sq`; on a CPU views.

    Muon has one, `<name>.momentum_buffer`.
    """
    return {
        f"{name}.{moment}": to_numpy(optimizer.state[parameter][moment])
        for name, parameter in parameters.items()
        for moment in MOMENTS
        if moment in optimizer.state[parameter]
    }


def load_moments(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], moments: Arrays, steps: int
) -> None:
    """Go on with `moments_of` after `steps` steps, of which the bias correction depends; others stay without."""
    for name, parameter in parameters.items():
        found = {moment: moments[f"{name}.{moment}"] for moment in MOMENTS if f"{name}.{moment}" in moments}
        state = {moment: torch.from_numpy(array.copy()).to(parameter.device) for moment, array in found.items()}
        if MOMENTS[0] in found:
            state["step"] = torch.tensor(float(steps), device=parameter.device)
        if state:
            optimizer.state[parameter] = state
