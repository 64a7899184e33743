"""Number formats for training, decided once per run and written into it: bits must not depend on where it resumes."""

from pathlib import Path
from typing import Literal

import torch

from shared.experiment.config import Experiment

Precision = Literal["float32", "bfloat16"]
_CPU_INFO = Path("/proc/cpuinfo")
_MATMUL_TOLERANCE = 1e-5


def decide_precision(experiment: Experiment, device: torch.device | str) -> Precision:
    """What `train.precision` means on this device.

    `auto` is bfloat16 where it is faster: GPUs with bfloat16 units, CPUs with avx512_bf16 or AMX. DP-SGD is float32,
    because the accountant assumes exact clipping.
    """
    if experiment.train.precision != "auto":
        return experiment.train.precision
    if experiment.privacy.mechanism != "none":
        return "float32"
    if torch.device(device).type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bfloat16" if cpu_flags() & {"avx512_bf16", "amx_bf16"} else "float32"


def cpu_flags() -> frozenset[str]:
    """Instruction sets of the processor, as Linux names them; empty elsewhere."""
    if not _CPU_INFO.exists():
        return frozenset()
    lines = _CPU_INFO.read_text(encoding="utf-8").splitlines()
    flags = next((line.partition(":")[2] for line in lines if line.startswith(("flags", "Features"))), "")
    return frozenset(flags.split())


def speed_up_float32() -> bool:
    """Let float32 matrix products on a CPU take oneDNN's path, where that stays float32-accurate.

    On processors without AMX torch's setting "medium" is up to twice as fast as the default library on AMD and as
    accurate; with AMX it computes in bfloat16. So the error of one product decides. It holds for the whole process.

    Returns:
        Whether the faster path is on.
    """
    before = torch.get_float32_matmul_precision()
    random = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 256, 256, generator=random)
    exact = left.double() @ right.double()
    torch.set_float32_matmul_precision("medium")
    error = float((left @ right - exact).norm() / exact.norm())
    if error > _MATMUL_TOLERANCE:
        torch.set_float32_matmul_precision(before)
    return error <= _MATMUL_TOLERANCE
