"""Samples of the same seeds in batches of 1, 7 and 64, and by 1 and 2 ranks of torchrun: largest difference."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from benchmarks.measure import verdict, without_options
from benchmarks.scratch import scratch
from shared.diffusion.uvit import build_model
from shared.evaluation.generate import sample_x_0
from shared.experiment.config import parse_experiment
from shared.storage.checkpoint import save_checkpoint

SEED = 0
IMAGES = 64
ALLOWED = 1e-5
EXPERIMENT = "[model]\nimage_size = 32\npatch_size = 4\n[evaluation]\nsteps = 20\neta = 1.0\nbatch = 16\n"


def main() -> int:
    """Print the differences; 0 when at most 1e-5."""
    experiment = parse_experiment(EXPERIMENT)
    torch.manual_seed(SEED)
    model = build_model(experiment).eval()
    seeds = list(range(SEED, SEED + IMAGES))
    found = {
        size: torch.cat(
            [sample_x_0(model, experiment, seeds[start : start + size]) for start in range(0, IMAGES, size)]
        )
        for size in (64, 7, 1)
    }
    worst = max(float((found[size] - found[64]).abs().max()) for size in (7, 1))
    print(f"batches of 1 and 7 against 64: largest difference {worst:.1e} in [-1, 1]")
    with scratch() as folder:
        tensors = {key: tensor.numpy() for key, tensor in model.state_dict().items()}
        save_checkpoint(folder / "model", {"ema": tensors}, {"experiment": experiment, "step": 0})
        arrays = [by_ranks(folder, ranks) for ranks in (1, 2)]
    levels = int(np.abs(arrays[0].astype(int) - arrays[1]).max())
    print(f"2 ranks against 1: largest difference {levels} of 255 levels after rounding")
    text = f"batches 1, 7, 64: {worst:.1e} (at most {ALLOWED:.0e}); 1 and 2 ranks: {levels} levels"
    return verdict("sampling equality, float32", text, reached=worst <= ALLOWED and levels == 0)


def by_ranks(folder: Path, ranks: int) -> np.ndarray:
    """Images of the sample command under torchrun with so many processes."""
    out = folder / f"{ranks}.npy"
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", "server.cli.main"]
    # More than one part, so that two ranks have something to share.
    command = [sys.executable, *launcher, "sample", str(folder / "model"), "--num-images", "300", "--out", str(out)]
    command += ["--device", "cpu", "--set", "evaluation.steps=4", "--set", "evaluation.batch=64"]
    subprocess.run(command, check=True, capture_output=True)
    array: np.ndarray = np.load(out)
    return array


if __name__ == "__main__":
    sys.exit(without_options(main, __doc__))
