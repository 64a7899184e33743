"""Whether networks go through `torch.compile` on this machine."""

import os
import shutil
import sysconfig
from pathlib import Path

import torch

from shared.experiment.config import Experiment


def should_compile(experiment: Experiment, device: torch.device) -> bool:
    """Whether the network goes through `torch.compile`: on GPUs that can, unless forbidden; shapes are static."""
    return device.type == "cuda" and experiment.train.compile == "auto" and has_compiler()


def has_compiler() -> bool:
    """Whether kernels can be compiled here: their launchers are C programs against Python's headers."""
    headers = Path(sysconfig.get_paths("posix_prefix")["include"])
    return (headers / "Python.h").exists() and any((os.environ.get("CC"), shutil.which("gcc"), shutil.which("clang")))
