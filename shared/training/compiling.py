"""Whether networks go through `torch.compile` on this machine."""

import os
import shutil
import sysconfig
from pathlib import Path

import torch

from shared.experiment.config import Experiment
from shared.paths import user_folder


def should_compile(experiment: Experiment, device: torch.device) -> bool:
    """Whether the network goes through `torch.compile`: on GPUs that can, unless forbidden; shapes are static."""
    is_wanted = device.type == "cuda" and experiment.train.compile == "auto" and has_compiler()
    if is_wanted:
        keep_caches_private()
    return is_wanted


def keep_caches_private() -> None:
    """Let torch keep what it compiles in this user's cache folder, unless the environment names another.

    It is loaded as code again, and torch's own choice is the temporary folder, where others may have made it before.
    """
    folder = user_folder("XDG_CACHE_HOME", ".cache") / "maskfed"
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        os.environ.setdefault(name, str(folder / name.lower()))


def has_compiler() -> bool:
    """Whether kernels can be compiled here: their launchers are C programs against Python's headers."""
    headers = Path(sysconfig.get_paths("posix_prefix")["include"])
    return (headers / "Python.h").exists() and any((os.environ.get("CC"), shutil.which("gcc"), shutil.which("clang")))
