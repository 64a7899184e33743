"""AdamW as the paper's training uses it, and its learning rate over time."""

import torch
from torch import nn

from shared.diffusion.uvit import Positions
from shared.experiment.sections import OptimConfig


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


def lr_at(step: int, config: OptimConfig) -> float:
    """Learning rate of 0-based `step`: a linear ramp over `warmup_steps` that ends at `lr`, then constant.

    It begins with lr / warmup_steps, or, where `warmup_from_zero` is set, one step later with 0, as the authors'.
    """
    done = step if config.warmup_from_zero else step + 1
    return config.lr * min(1.0, done / config.warmup_steps) if config.warmup_steps else config.lr


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group of `optimizer` the learning rate `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr
