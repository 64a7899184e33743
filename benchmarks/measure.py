"""Timing and arithmetic that the benchmarks share."""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping

from shared.training.flops import hardware, train_flops

__all__ = [
    "UNMEASURED",
    "cpu_seconds",
    "die_with_parent",
    "hardware",
    "medians",
    "not_measured",
    "paired_ratio",
    "train_flops",
    "verdict",
    "without_options",
]

UNMEASURED = 77
"""Exit status of a benchmark that cannot run on a machine, as automake has it: neither reached nor short."""
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


def without_options(main: Callable[[], int], text: str | None) -> int:
    """Run a benchmark that has no options: `--help` shows its text, and a word too much is refused, not ignored."""
    argparse.ArgumentParser(description=text).parse_args()
    return main()


def verdict(name: str, text: str, *, reached: bool) -> int:
    """Print the last line of a benchmark and return its exit status: 0 when the figure is reached, else 1."""
    print(f"{name}: {text}: {'reached' if reached else 'NOT reached'}")
    return 0 if reached else 1


def die_with_parent() -> None:
    """The first call of a worker process: it ends with whoever started it, and what it starts ends with it."""
    from server.runs.child_process import dies_with_parent

    dies_with_parent()()


def not_measured(name: str, reason: str) -> int:
    """Print the last line of a benchmark that cannot run here, and return `UNMEASURED`: a stored figure stays."""
    print(f"{name}: not measured: {reason}")
    return UNMEASURED
