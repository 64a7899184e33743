"""The laboratory's table: losses on held-out persons, and what an arm has above the best known, paired by seed."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.federation_lab.arms import STEPS, Arm
from shared.student import mean_interval

TODAY, LONG, PRODUCT = "one", "one-long", "four-product-muon"
BYTES = 64.0
"""A weight, received and sent: of eight rounds in float32. A recipe for sites takes no more."""
MOST, MOST_UPPER, LEAST_GAIN = 1.05, 1.10, 0.30
"""Excess of the recipe over that of pooled training and the upper end of its interval; what a site gains by it."""
MOST_UNEVEN = 1.15
"""Excess of the recipe in an uneven world over that in the even one."""
PAIRS = (
    ("four-kept", "four"),
    ("four-restart-warm-once", "four"),
    ("four-kept", "four-restart-warm-once"),
    ("four-kept-cosine", "four-kept"),
    ("four-kept-cosine-lr-double", "four-kept"),
    ("four-kept-h50", "four-kept"),
    ("four-nesterov-50", "four-kept-h50"),
    ("one-kept", "one"),
    ("four-kept", "one-kept"),
    ("alone-kept", "four-kept"),
    ("four-int8-h40-lr-double", "four-kept-lr-double"),
    ("four-mixed-h58-lr-double", "four-kept-lr-double"),
    ("four-int8-h40-pooled", "four-int8-h40-lr-double"),
    ("four-int8-h40-push", "four-int8-h40-lr-double"),
    ("four-int8-h40-lr-double-beta", "four-int8-h40-lr-double"),
    ("one-kept-lr-double-beta", "one-kept-lr-double"),
    ("four-int8-h40-lr-double-beta", "one-kept-lr-double-beta"),
    ("four-int8-h40-muon-lr-double", "four-int8-h40-lr-double"),
    ("one-muon-lr-double", "one-kept-lr-double"),
    ("four-int8-h40-muon-lr-double", "one-muon-lr-double"),
    ("four-product-muon", "one-muon-lr-double"),
    ("four-product-muon", "one-kept-lr-double-beta"),
    ("four-product-muon", "four-kept-muon"),
    ("four-product-muon", "four-muon-float32"),
    ("four-product-muon", "four-muon-bfloat16"),
    ("four-int4-h20-muon", "one-muon-lr-double"),
    ("alone-muon", "four-product-muon"),
)
"""Arms whose difference is told, paired by seed; the second is what the first changes."""
Losses = NDArray[np.float64]
Interval = tuple[float, float, float]


def table(lines: Sequence[Mapping[str, Any]]) -> tuple[str, bool]:
    """Print a row for each arm; the last line's text, and whether the goals are reached."""
    arms = {line["arm"]["name"]: line for line in lines}
    print(head())
    for name in arms:
        print(row(name, arms))
    for above, below in PAIRS:
        if above in arms and below in arms:
            print(f"{above} - {below}: {in_words(interval(at_end(arms[above]) - at_end(arms[below])), '+.4f')}")
    sides = {side: [arms[name] for name in arms if is_of(Arm(**arms[name]["arm"]))] for side, is_of in SIDES.items()}
    missing = [side for side, found in sides.items() if not found] + [LONG] * (LONG not in arms)
    if missing:
        return f"{len(arms)} arms, not run: {', '.join(missing)}", False
    if PRODUCT in arms:
        for text in uneven_worlds(arms):
            print(text)
        for kind in KINDS:
            print(in_kind(kind, {**sides, "four sites": [arms[PRODUCT]]}, best_known(arms))[0])
    told = [in_kind(kind, sides, best_known(arms)) for kind in KINDS]
    return "; ".join(text for text, _ in told), all(is_reached for _, is_reached in told)


def in_kind(kind: str, sides: Mapping[str, Sequence[Any]], floor: Losses) -> tuple[str, bool]:
    """What sites pay and gain with one kind of weights, each side by its own best arm; whether that is the goal."""
    best = {side: min(((ended(line, kind), line) for line in lines), key=_mean) for side, lines in sides.items()}
    four, one, alone = (best[side][0] - floor for side in SIDES)
    price, left = ratio(four, one), ratio(four, alone)
    names = [best[side][1]["arm"]["name"] for side in SIDES]
    text = (
        f"{kind} weights: excess of four sites ({names[0]}) over one ({names[1]}) {in_words(price)}, {1 - left[0]:.0%} "
        f"[{1 - left[2]:.0%}, {1 - left[1]:.0%}] below that of the best site alone ({names[2]})"
    )
    return text, price[0] <= MOST and price[2] <= MOST_UPPER and 1 - left[0] >= LEAST_GAIN


def uneven_worlds(arms: Mapping[str, Any]) -> list[str]:
    """What the product's recipe loses where sites are uneven: its excess over that of the even world, by last weights.

    A world that sees fewer images pays for these, too.
    """
    floor, even = best_known(arms), at_end(arms[PRODUCT])
    found = []
    for name, line in arms.items():
        if Arm(**line["arm"]).uneven != "no":
            value = ratio(at_end(line) - floor, even - floor)
            is_within = value[0] <= MOST_UNEVEN
            found.append(
                f"{name}: excess {in_words(value)} times that of {PRODUCT} (limit {MOST_UNEVEN}): "
                f"{'reached' if is_within else 'NOT reached'}"
            )
    return found


def _mean(found: tuple[Losses, Any]) -> float:
    return float(found[0].mean())


def _is_plain(arm: Arm) -> bool:
    return (arm.steps, arm.start, arm.synchronised, arm.uneven) == (STEPS, 1, False, "no")


SIDES: dict[str, Callable[[Arm], bool]] = {
    "four sites": lambda arm: (
        _is_plain(arm)
        and (arm.division, arm.batch, arm.alone) == ("person", 4, False)
        and arm.bytes_per_weight <= BYTES
    ),
    "one site": lambda arm: _is_plain(arm) and (arm.division, arm.batch) == ("pool", 16),
    "a site alone": lambda arm: _is_plain(arm) and arm.alone,
}
"""At equal images, or at equal time of a site: which arms are a side's."""
KINDS = ("last", "averaged")


def head() -> str:
    """Of the table."""
    columns = (
        "arm",
        "images",
        "bytes",
        "raw",
        "error",
        "spread",
        "product's average",
        "best average",
        f"raw - {TODAY}",
        "excess",
    )
    return "| " + " | ".join(columns) + " |\n|" + " --- |" * len(columns)


def row(name: str, arms: Mapping[str, Any]) -> str:
    """One arm: means over the seeds, differences to the arm that stands for today's pooled training."""
    line, raw = arms[name], at_end(arms[name])
    powers = {kind: at_end(line, kind).mean() for kind in end_of(line) if kind.startswith("power")}
    best = min(powers, key=lambda kind: powers[kind])
    arm, cells = line["arm"], [name]
    cells.append(f"{arm['steps'] * arm['batch'] * (1 if arm['division'] == 'pool' else 4):,}")
    cells.append("" if arm["division"] == "pool" or arm["alone"] else f"{Arm(**arm).bytes_per_weight:.0f}")
    error = np.mean([error for _, error in end_of(line)["raw"]])
    cells += [f"{raw.mean():.5f}", f"{error:.4f}", f"{raw.std(ddof=1):.5f}", f"{at_end(line, 'ema').mean():.5f}"]
    cells.append(f"{powers[best]:.5f} ({best.removeprefix('power-')})")
    cells.append(in_words(interval(raw - at_end(arms[TODAY])), "+.5f") if TODAY in arms and name != TODAY else "")
    if LONG in arms and TODAY in arms and name != TODAY and arm["steps"] == STEPS:
        floor = best_known(arms)
        cells.append(in_words(ratio(raw - floor, at_end(arms[TODAY]) - floor)))
    return "| " + " | ".join(cells) + " |"


def end_of(line: Mapping[str, Any]) -> Mapping[str, Any]:
    """Losses after the last step, by kind of weights."""
    return line["scores"][str(line["arm"]["steps"])]  # type: ignore[no-any-return]


def at_end(line: Mapping[str, Any], kind: str = "raw") -> Losses:
    """Loss of each seed; that of the best site where sites are alone."""
    losses = np.array([loss for loss, _ in end_of(line)[kind]])
    return losses.reshape(len(line["seeds"]), -1).min(1)


def ended(line: Mapping[str, Any], kind: str) -> Losses:
    """Loss of each seed with the last weights, or with the one average that is best over the seeds."""
    if kind == "last":
        return at_end(line)
    return min((at_end(line, name) for name in end_of(line) if name != "raw"), key=lambda losses: float(losses.mean()))


def best_known(arms: Mapping[str, Any]) -> Losses:
    """Least loss of each seed that any arm has reached with any weights."""
    found = [at_end(line, kind) for line in arms.values() for kind in end_of(line)]
    return np.min(found, 0)  # type: ignore[no-any-return]


def interval(values: Losses) -> Interval:
    """Mean of a value per seed, with its 95 percent interval by Student's t."""
    return mean_interval(values.tolist())


def ratio(above: Losses, below: Losses) -> Interval:
    """Geometric mean of the ratio of each seed, with its interval; not a number where an excess is none."""
    if min(above.min(), below.min()) <= 0:
        return math.nan, math.nan, math.nan
    mean, low, high = interval(np.log(above / below))
    return math.exp(mean), math.exp(low), math.exp(high)


def in_words(value: Interval, form: str = ".2f") -> str:
    """Value and interval."""
    return f"{value[0]:{form}} [{value[1]:{form}}, {value[2]:{form}}]"
