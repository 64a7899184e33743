"""What a training costs and on which hardware it runs, for benchmarks and studies."""

import platform
from pathlib import Path

import torch
from torch import nn

from shared.diffusion.uvit import UViT, build_model
from shared.experiment.config import Experiment
from shared.training.optimizer import ITERATIONS
from shared.updates.trainable import is_hidden_matrix


def train_flops(experiment: Experiment) -> float:
    """Floating-point operations of forward and backward per image: 2 per multiply-add, backward twice the forward.

    Linear layers and the two attention products of the U-ViT on its visible tokens and the time token; norms, softmax,
    GELU, optimizer and the average are not counted, as usual for shares of the peak. Of the U-Net, convolutions and
    products of one forward pass as torch counts them. Of `crops`, the mean over the squares that may be drawn.
    """
    if experiment.mask.kind == "crops":
        sides = experiment.mask.crop_sides
        return sum(share * train_flops(_cropped(experiment, divisor)) for divisor, share in sides.items())
    with torch.device("meta"):
        model = build_model(experiment)
    if not isinstance(model, UViT):
        return 3.0 * _forward_flops(model, experiment)
    width, skips, sequences = model.width, len(model.out_blocks), len(model.patch_values)
    blocks, tokens = 1 + 2 * skips, sequences * experiment.num_visible + 1
    values = sum(model.patch_values) / sequences
    per_token = blocks * 12 * width**2 + skips * 2 * width**2 + 2 * values * width
    return 3.0 * (2 * tokens * per_token + 4 * blocks * tokens**2 * width)


def training_flops(experiment: Experiment) -> float:
    """`train_flops`, and an image's share of the matrix products with which Muon makes a step of one batch.

    What arms of a study are compared by: at small batches and few tokens Muon's products are more than the network's.
    """
    return train_flops(experiment) + muon_flops(experiment) / experiment.train.batch


def muon_flops(experiment: Experiment) -> float:
    """Floating-point operations of Newton and Schulz's iterations of one step; 0 for AdamW.

    Of a matrix of A by B numbers, A the smaller, each iteration is two products of A A B and one of A A A.
    """
    if experiment.optim.optimizer != "muon":
        return 0.0
    with torch.device("meta"):
        named = [(name, tuple(each.shape)) for name, each in build_model(experiment).named_parameters()]
    shapes = [sorted(shape) for name, shape in named if is_hidden_matrix(name, shape)]
    return float(sum(ITERATIONS * 2 * (2 * a * a * b + a**3) for a, b in shapes))


def _cropped(experiment: Experiment, divisor: int) -> Experiment:
    """The experiment with one fixed square, or without a mask."""
    ratio = 1 - 1 / divisor**2
    mask = {"kind": "crop" if ratio else "none", "ratio": ratio}
    return Experiment.model_validate(
        {**experiment.model_dump(), "train": {"objective": "msm" if ratio else "dsm"}, "mask": mask}
    )


def _forward_flops(model: nn.Module, experiment: Experiment) -> int:
    """Convolutions and matrix products for one image, on a device that computes nothing."""
    from torch.utils.flop_counter import FlopCounterMode

    visible, values = experiment.num_visible, experiment.model.patch_size**2 * experiment.in_channels
    inputs = (torch.empty(1, visible, values), torch.zeros(1, dtype=torch.long), torch.zeros(1, visible).long())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*(each.to("meta") for each in inputs))
    return int(counter.get_total_flops())


def hardware() -> str:
    """The processor this runs on, and the GPU where there is one."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cpu = f"{names[0] if names else platform.processor() or platform.machine()}, {len(names) or 1} cores"
    return f"{torch.cuda.get_device_name()}; {cpu}" if torch.cuda.is_available() else cpu
