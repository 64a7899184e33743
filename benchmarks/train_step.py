"""Share of the CPU's bfloat16 matrix peak that a whole training step of the S model reaches, on one thread.

A step is what `maskfed-server train` does: flip, masks, noise, forward, backward, clipping, AdamW, moving average. The
peak is the fastest 2048^3 product of the same rounds, a step is the median. Where a compiler is, mask 0.9 is also timed
with its blocks compiled, which training on a CPU does not do.
"""

import shutil
import sys

import torch

from benchmarks.measure import Action, cpu_seconds, medians, not_measured, train_flops, verdict, without_options
from shared.diffusion.uvit import UViT, build_model
from shared.experiment.config import Experiment
from shared.seeding import Streams
from shared.training.engine import Engine
from shared.training.precision import cpu_flags

SEED = 0
ROUNDS = 5
NEEDED = {0.9: 0.52, 0.5: 0.48, 0.0: 0.43}
GOALS = {0.9: 0.58, 0.5: 0.54, 0.0: 0.50}
BATCHES = {0.9: 16, 0.5: 4, 0.0: 2}
PEAK_SIZE = 2048


def make_experiment(mask_ratio: float, batch: int, size: str = "S") -> Experiment:
    """S at 64 px with 4 x 4 block masks in bfloat16."""
    masked = mask_ratio > 0
    return Experiment.model_validate(
        {
            "train": {"objective": "msm" if masked else "dsm", "batch": batch, "precision": "bfloat16"},
            "model": {"size": size, "image_size": 64, "patch_size": 4},
            "mask": {"kind": "block" if masked else "none", "ratio": mask_ratio, "block_size": 4},
        }
    )


def make_step(experiment: Experiment, *, compiled: bool = False) -> Action:
    """A training step on fixed random images."""
    torch.manual_seed(SEED)
    model = build_model(experiment)
    if compiled:
        assert isinstance(model, UViT)
        for block in (*model.in_blocks, model.mid_block, *model.out_blocks):
            block.compile(dynamic=False)
    engine = Engine(experiment, model, Streams(SEED))
    images = torch.randint(256, (experiment.train.batch, 3, 64, 64), dtype=torch.uint8)
    return lambda: engine.step(images)


def make_peak() -> Action:
    """The matrix product that counts as 100 percent."""
    left, right = torch.randn(2, PEAK_SIZE, PEAK_SIZE).bfloat16()
    return lambda: torch.nn.functional.linear(left, right)


def main() -> int:
    """Print the shares; 0 when all reach what is needed or the CPU has no bfloat16 units."""
    if not cpu_flags() & {"avx512_bf16", "amx_bf16"}:
        return not_measured("train_step", "this CPU has neither avx512_bf16 nor AMX")
    torch.set_num_threads(1)
    shares = measure_shares(BATCHES)
    if shutil.which("c++") or shutil.which("g++"):
        measure_shares({0.9: BATCHES[0.9]}, compiled=True)
    else:
        print("compiled blocks: not measured: no C++ compiler")
    parts = [
        f"{shares[ratio]:.0%} at mask {ratio} (needs {NEEDED[ratio]:.0%}, goal {GOALS[ratio]:.0%})" for ratio in shares
    ]
    return verdict(
        "bf16 train step S 64 px, share of GEMM peak",
        ", ".join(parts),
        reached=all(shares[ratio] >= NEEDED[ratio] for ratio in shares),
    )


def measure_shares(batches: dict[float, int], *, compiled: bool = False) -> dict[float, float]:
    """Share of the peak by mask ratio, from rounds in which the product and the steps take turns."""
    experiments = {ratio: make_experiment(ratio, batch) for ratio, batch in batches.items()}
    steps = {str(ratio): make_step(experiment, compiled=compiled) for ratio, experiment in experiments.items()}
    times = cpu_seconds({"peak": make_peak(), **steps}, ROUNDS, warm_up=2)
    middle = medians(times)
    peak = 2 * PEAK_SIZE**3 / min(times["peak"])
    print(f"{'compiled' if compiled else 'eager'} blocks; peak {peak / 1e9:.0f} GFLOP/s")
    shares = {}
    for ratio, experiment in experiments.items():
        seconds = middle[str(ratio)]
        shares[ratio] = train_flops(experiment) * experiment.train.batch / seconds / peak
        print(
            f"mask {ratio}: {seconds * 1000:.0f} ms, {experiment.train.batch / seconds:.1f} images/s, "
            f"{shares[ratio]:.1%} of the peak"
        )
    return shares


if __name__ == "__main__":
    sys.exit(without_options(main, __doc__))
