# ruff: noqa: N806
"""DP-SGD step against a plain AdamW step, T at 32 px, one thread: process CPU time interleaved, and extra peak memory.

Rows: K = 1, B = 64 against plain 64; K = 4, B = 16 against the plain step of 64 draws, and against four DP steps with
K = 1, B = 16. Memory is the highest resident size of a fresh process above what it had with all modules loaded.

`--against TREE` instead times the DP step here and that of another checkout (with its own `.venv`) in turn, B = 64:
what a change of the mechanism costs. 813eedd is the last commit with noise of torch's generator, without a grid.
"""

import argparse
import itertools
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import Action, cpu_seconds, medians, paired_ratio, verdict
from client.data.units import Ids
from client.privacy import dp_sgd
from client.privacy.randomness.secret_random import secret_streams
from shared.diffusion.losses import draw_noise, per_image_loss
from shared.diffusion.schedule import make_schedule
from shared.diffusion.uvit import build_model
from shared.experiment.config import Experiment, parse_experiment
from shared.training.optimizer import make_optimizer

SEED = 0
ROUNDS = 7
PAIRS, NEEDED_AGAINST = 20, 1.15
TIMER = """
import sys, time, torch
torch.set_num_threads(1)
from benchmarks.dp_step import dp_step
step = dp_step(64, 1)
for _ in sys.stdin:
    start = time.process_time()
    step()
    print(time.process_time() - start, flush=True)
"""
NEEDED_STEP, GOAL_STEP, NEEDED_MEMORY, NEEDED_DRAWS, NEEDED_AGAINST_FOUR = 3.0, 2.2, 1.6, 2.3, 0.85


def main(arguments: Sequence[str] = ()) -> int:
    """Print each ratio; 0 when all limits are kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", choices=["plain", "dp"], help="run a few steps and print the extra peak in MB")
    parser.add_argument("--against", type=Path, metavar="TREE", help="another checkout whose DP step is the measure")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.against:
        return compare(options.against)
    if options.memory:
        print(extra_peak_mb(plain_step if options.memory == "plain" else dp_step))
        return 0
    actions: dict[str, Action] = {
        "plain B=64": plain_step(64, 1),
        "dp B=64": dp_step(64, 1),
        "dp B=16 K=4": dp_step(16, 4),
        "dp B=16": dp_step(16, 1),
    }
    times = cpu_seconds(actions, ROUNDS)
    print(", ".join(f"{name} {seconds:.3f} s" for name, seconds in medians(times).items()))
    step, draws = paired_ratio(times, "dp B=64", "plain B=64"), paired_ratio(times, "dp B=16 K=4", "plain B=64")
    against_four = paired_ratio(times, "dp B=16 K=4", "dp B=16") / 4
    peaks = {kind: measured_peak(kind) for kind in ("plain", "dp")}
    memory = peaks["dp"] / peaks["plain"]
    print(f"extra peak memory: plain {peaks['plain']:.0f} MB, dp {peaks['dp']:.0f} MB")
    text = (
        f"{step:.2f}x plain (limit {NEEDED_STEP}, goal {GOAL_STEP}), memory {memory:.2f}x (limit {NEEDED_MEMORY}), "
        f"K = 4 {draws:.2f}x (limit {NEEDED_DRAWS}) and {against_four:.2f}x four steps (limit {NEEDED_AGAINST_FOUR})"
    )
    is_reached = step <= NEEDED_STEP and memory <= NEEDED_MEMORY
    return verdict(
        "DP-SGD step", text, reached=is_reached and draws <= NEEDED_DRAWS and against_four <= NEEDED_AGAINST_FOUR
    )


def make_experiment(draws: int, batch: int) -> Experiment:
    """T at 32 px with patches of 4, DP-SGD with `draws` noise draws of each of `batch` units."""
    constants = f"draws = {draws}\nmicro_batch = 64\nsample_rate = 1\nexpected_batch = {batch}\n"
    return parse_experiment(f'[privacy]\nmechanism = "dp-sgd"\n{constants}')


def plain_step(batch: int, draws: int) -> Action:
    """A step of AdamW on `batch` images."""
    experiment = make_experiment(draws, batch)
    torch.manual_seed(SEED)
    model, schedule = build_model(experiment).train(), make_schedule("cosine", 1000)
    optimizer, random, images = make_optimizer(model, experiment.optim), torch.Generator(), some_images(batch)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss_B = per_image_loss(model, schedule, experiment, images, *draw_noise(experiment, batch, random))
        torch.autograd.backward(loss_B.mean())
        optimizer.step()

    return step


def dp_step(batch: int, draws: int) -> Action:
    """A whole DP step in which all of `batch` units are sampled: reading, draws, clipping, noise, optimizer."""
    experiment = make_experiment(draws, batch)
    torch.manual_seed(SEED)
    model = build_model(experiment).train()
    machine = dp_sgd.PrivateStep(model, experiment, torch.device("cpu"), "float32")
    optimizer, images, streams = make_optimizer(model, experiment.optim), Stored(batch), secret_streams()
    units, numbers = list(np.arange(batch).reshape(-1, 1)), itertools.count()

    def step() -> None:
        machine.take(images, units, streams.child(next(numbers)))
        optimizer.step()

    return step


def compare(other: Path) -> int:
    """Time this tree's DP step and another's alternately, each in a process of its own."""
    here = Path(__file__).parent.parent
    with timer(other) as theirs, timer(here) as ours:
        times = [(seconds(theirs), seconds(ours)) for _ in range(PAIRS + 1)][1:]
    ratios = sorted(mine / its for its, mine in times)
    quarters = statistics.quantiles(ratios, n=4)
    text = (
        f"{quarters[1]:.2f}x that of the other tree (quartiles {quarters[0]:.2f} to {quarters[2]:.2f}, {PAIRS} pairs, "
        f"limit {NEEDED_AGAINST}), {statistics.median(mine for _, mine in times):.2f} s a step"
    )
    return verdict("DP-SGD step", text, reached=quarters[1] <= NEEDED_AGAINST)


def timer(tree: Path) -> "subprocess.Popen[str]":
    """A process that makes a DP step of a checkout for each line it gets, and answers with its CPU seconds."""
    return subprocess.Popen(
        [tree / ".venv" / "bin" / "python", "-W", "ignore", "-c", TIMER],
        cwd=tree, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(tree.resolve()), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def seconds(timing: "subprocess.Popen[str]") -> float:
    """CPU seconds of one more step."""
    assert timing.stdin and timing.stdout
    timing.stdin.write("step\n")
    timing.stdin.flush()
    return float(timing.stdout.readline())


class Stored:
    """Images in memory, as a site's cache gives them."""

    def __init__(self, count: int) -> None:
        self.images = some_images(count)

    def batch(self, ids: Ids) -> Tensor:
        """uint8 (B, 3, 32, 32)."""
        return self.images[torch.from_numpy(ids)]


def some_images(batch: int) -> Tensor:
    """Seeded uint8 noise (B, 3, 32, 32)."""
    return torch.randint(256, (batch, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(SEED))


def extra_peak_mb(make_step: Callable[[int, int], Action]) -> float:
    """Highest resident size of this process over three steps of B = 64, above that before the model was built."""
    before = memory_kb("VmRSS")
    step = make_step(64, 1)
    for _ in range(3):
        step()
    return (memory_kb("VmHWM") - before) / 1024


def memory_kb(field: str) -> int:
    """A line of this process's status: VmRSS now, VmHWM at most since the program began."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def measured_peak(kind: str) -> float:
    """Smallest of three fresh processes."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.dp_step", "--memory", kind]
    return min(
        float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]) for _ in range(3)
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
