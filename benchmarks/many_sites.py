"""What 10,000 sites would take with aggregators between them and the coordinator: reckoned from pieces measured here.

    python -m benchmarks.many_sites [--sites N] [--fan-out F]

The project has no such aggregators, so this is an estimate on paper: an aggregator would check and add up the updates
of its sites as the coordinator does, and send the sum on, 8 bytes a number. Sums of integers are the same in any
order, so a tree of them has the bits of one coordinator. Links are assumed, arithmetic is measured.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from server.federation.updates.aggregation import FixedPointSum, check_update
from shared.messages.packing import Manifest, encode
from shared.updates.wire_sizes import WireDtype, wire_bytes

ROUNDS, SEED = 3, 0
SAMPLE = 2**22
"""Numbers of the update that is measured; time and bytes are in proportion."""
SUM_BYTES = 8
MODELS = {"T at 32 px": 3_360_000, "S at 64 px": 44_290_000}
WIRES: tuple[WireDtype, ...] = ("float32", "bfloat16", "int8")
SITE_LINK, HUB_LINK = 100e6 / 8, 1e9 / 8
"""Assumed bytes a second of a site's upload, and of each aggregator and the coordinator."""
REPLIES_AT_ONCE = 4
"""Replies that an aggregator has in memory while it adds, as the coordinator."""


@dataclass(frozen=True)
class Level:
    """One machine that adds up what `children` send it in a round."""

    children: int
    bytes_in: float
    bytes_out: float
    seconds: float
    memory_bytes: float


def machine(children: int, numbers: int, child_bytes: float, add_seconds: float, *, is_top: bool) -> Level:
    """An aggregator or the coordinator.

    Args:
        children: that send it an update, or a sum.
        numbers: of the model.
        child_bytes: of one of these.
        add_seconds: to check and add one of them.
        is_top: the coordinator, which sends no sum on.
    """
    bytes_in, bytes_out = children * child_bytes, 0.0 if is_top else float(SUM_BYTES * numbers)
    seconds = max(bytes_in / HUB_LINK, children * add_seconds) + bytes_out / HUB_LINK
    return Level(children, bytes_in, bytes_out, seconds, SUM_BYTES * numbers + REPLIES_AT_ONCE * child_bytes)


def tree(sites: int, fan_out: int, numbers: int, update_bytes: float, add: float, add_sum: float) -> list[Level]:
    """Machines from the one that sites answer to up to the coordinator, one of each kind."""
    levels, left, child_bytes, seconds = [], sites, update_bytes, add
    while left > fan_out:
        levels.append(machine(fan_out, numbers, child_bytes, seconds, is_top=False))
        left, child_bytes, seconds = math.ceil(left / fan_out), float(SUM_BYTES * numbers), add_sum
    return [*levels, machine(left, numbers, child_bytes, seconds, is_top=True)]


def seconds_per_number(action: Callable[[], object], times: int = ROUNDS) -> float:
    """Processor time, the least of some runs."""
    found = []
    for _ in range(times):
        begin = time.process_time()
        action()
        found.append(time.process_time() - begin)
    return min(found) / SAMPLE


def measured() -> dict[str, float]:
    """Seconds to check and add one number by wire, and to add one of a sum."""
    update = np.random.default_rng(SEED).normal(scale=1e-3, size=SAMPLE).astype(np.float32)
    manifest, total, found = Manifest.of({"all": update}), FixedPointSum(SAMPLE), {}
    for wire in WIRES:
        sent = encode(update, wire)

        def add(sent: np.ndarray = sent, wire: WireDtype = wire) -> None:
            check_update(sent, wire, manifest)
            total.fold(sent, wire, 1)

        found[wire] = seconds_per_number(add)
    sums = np.zeros((2, SAMPLE), np.int64)
    found["sum"] = seconds_per_number(lambda: np.add(sums[0], sums[1], out=sums[0]))
    return found


def main(arguments: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.many_sites", description=__doc__.splitlines()[0])
    parser.add_argument("--sites", type=int, default=10_000)
    parser.add_argument("--fan-out", type=int, default=100, help="sites or aggregators of one machine")
    options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    pieces = measured()
    print("ns a number, measured: " + ", ".join(f"{name} {1e9 * value:.1f}" for name, value in pieces.items()))
    print(f"assumed: sites send {SITE_LINK / 1e6:.1f} MB/s, aggregators take {HUB_LINK / 1e6:.0f} MB/s")
    print("| model | wire | a site sends | without a tree | in a tree, coordinator | aggregator | memory of it |")
    print("|" + " --- |" * 7)
    for model, numbers in MODELS.items():
        for wire in WIRES:
            print(row(model, wire, numbers, options.sites, options.fan_out, pieces))
    numbers = MODELS["S at 64 px"]
    size = wire_bytes(numbers, "int8")
    levels = tree(options.sites, options.fan_out, numbers, size, numbers * pieces["int8"], numbers * pieces["sum"])
    seconds = size / SITE_LINK + sum(level.seconds for level in levels)
    print(
        f"estimate, S with updates of 8 bits from {options.sites} sites in {len(levels)} levels: {seconds:.0f} s a "
        f"round besides the training, {levels[-1].bytes_in / 1e9:.0f} GB and {levels[-1].memory_bytes / 1e9:.1f} GB of "
        "memory at the coordinator"
    )
    return 0


def row(model: str, wire: WireDtype, numbers: int, sites: int, fan_out: int, pieces: dict[str, float]) -> str:
    """Bytes and seconds of a round, besides the training."""
    size, add = wire_bytes(numbers, wire), numbers * pieces[wire]
    flat = machine(sites, numbers, size, add, is_top=True)
    levels = tree(sites, fan_out, numbers, size, add, numbers * pieces["sum"])
    whole = size / SITE_LINK + sum(level.seconds for level in levels)
    cells = (
        f"{size / 1e6:.1f} MB, {size / SITE_LINK:.1f} s",
        f"{flat.bytes_in / 1e9:.0f} GB, {size / SITE_LINK + flat.seconds:.0f} s",
        f"{levels[-1].bytes_in / 1e9:.1f} GB, {whole:.0f} s in all",
        f"{levels[0].bytes_in / 1e9:.1f} GB in, {levels[0].bytes_out / 1e9:.2f} GB out, {levels[0].seconds:.0f} s",
        f"{levels[0].memory_bytes / 1e9:.2f} GB",
    )
    return f"| {model} | {wire} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(main())
