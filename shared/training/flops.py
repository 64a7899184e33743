"""What a training costs and on which hardware it runs, for benchmarks and studies."""

import platform
from pathlib import Path

import torch

from shared.diffusion.uvit import UViT, build_model
from shared.errors import InputError
from shared.experiment.config import Experiment


def train_flops(experiment: Experiment) -> float:
    """Floating-point operations of forward and backward per image: 2 per multiply-add, backward twice the forward.

    Linear layers and the two attention products of the U-ViT on its visible tokens and the time token; norms, softmax,
    GELU, optimizer and the average are not counted, as usual for shares of the peak.

    Raises:
        InputError: another backbone than the U-ViT.
    """
    with torch.device("meta"):
        model = build_model(experiment)
    if not isinstance(model, UViT):
        raise InputError(f"model.backbone {experiment.model.backbone!r}: operations are counted for 'uvit' only")
    width, skips = model.width, len(model.out_blocks)
    blocks, tokens = 1 + 2 * skips, experiment.num_visible + 1
    per_token = blocks * 12 * width**2 + skips * 2 * width**2 + 2 * model.embedding.in_features * width
    return 3.0 * (2 * tokens * per_token + 4 * blocks * tokens**2 * width)


def hardware() -> str:
    """The processor this runs on, and the GPU where there is one."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cpu = f"{names[0] if names else platform.processor() or platform.machine()}, {len(names) or 1} cores"
    return f"{torch.cuda.get_device_name()}; {cpu}" if torch.cuda.is_available() else cpu
