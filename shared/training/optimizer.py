"""AdamW as the paper's training uses it."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from shared.diffusion.uvit import Positions
from shared.experiment.sections import OptimConfig
from shared.training.weights import Arrays, to_numpy

MOMENTS = ("exp_avg", "exp_avg_sq")


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW over the trainable parameters: weight decay on matrices, none on positions, norms and biases.

    Where `decay_all` is set it is on these as well.

    Fused on the CPU too, where it is several times faster than the loop and `foreach` is not.
    """
    plain = {id(module.weight) for module in model.modules() if isinstance(module, Positions)}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    is_plain = [not config.decay_all and (p.ndim < 2 or id(p) in plain) for p in parameters]
    groups = [
        {"params": [p for p, plain in zip(parameters, is_plain, strict=True) if plain == wanted], "weight_decay": decay}
        for wanted, decay in ((False, config.weight_decay), (True, 0.0))
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], config.lr, config.betas, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group of `optimizer` the learning rate `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def moments_of(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> Arrays:
    """Both moments of each parameter that has made a step, `<name>.exp_avg` and `<name>.exp_avg_sq`; on a CPU views."""
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
        if f"{name}.{MOMENTS[0]}" not in moments:
            continue
        state: dict[str, Tensor] = {"step": torch.tensor(float(steps), device=parameter.device)}
        for moment in MOMENTS:
            state[moment] = torch.from_numpy(moments[f"{name}.{moment}"].copy()).to(parameter.device)
        optimizer.state[parameter] = state
