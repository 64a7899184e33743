"""Timing and arithmetic that the benchmarks share."""

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from shared.config import Experiment
from shared.uvit import UViT, build_model

Action = Callable[[], object]


def cpu_seconds(actions: Mapping[str, Action], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Process CPU seconds of each action in each round; they take turns, so that drifts of the machine meet all alike.

    Args:
        actions: what to time, by name.
        rounds: timed calls of each.
        warm_up: untimed calls of each before.
    """
    for action in actions.values():
        for _ in range(warm_up):
            action()
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            start = time.process_time()
            action()
            times[name].append(time.process_time() - start)
    return times


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    """Median of each list."""
    return {name: statistics.median(values) for name, values in times.items()}


def paired_ratio(times: Mapping[str, list[float]], above: str, below: str) -> float:
    """Median over the rounds of one action's time over another's."""
    return statistics.median(a / b for a, b in zip(times[above], times[below], strict=True))


def train_flops(experiment: Experiment) -> float:
    """Floating-point operations of forward and backward per image: 2 per multiply-add, backward twice the forward.

    Linear layers and the two attention products of the U-ViT on its visible tokens and the time token; norms, softmax,
    GELU, optimizer and the average are not counted, as usual for shares of the peak.
    """
    with torch.device("meta"):
        model = build_model(experiment)
    assert isinstance(model, UViT)
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


def verdict(name: str, text: str, *, reached: bool) -> int:
    """Print the last line of a benchmark and return its exit status: 0 when the figure is reached, else 1."""
    print(f"{name}: {text}: {'reached' if reached else 'NOT reached'}")
    return 0 if reached else 1
