"""Odd inputs as people have them: pictures, zips, trees, identity files, checkpoints, networks, samples and arguments.

Each case has the right value, computed here and not by the code that is asked, or the line that has to come. A
traceback, a wrong value or a silent loss is a failure. `--seed N` draws other cases, `--cases N` more or fewer.
"""

import argparse
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from benchmarks import wild_cases, wild_habits, wild_pictures
from benchmarks.measure import verdict
from benchmarks.scratch import scratch
from benchmarks.wild_pictures import Case
from shared.data.pixels import UnreadableImageError
from shared.errors import InputError

SEED, CASES = 0, 726
OUTCOMES = ("value", "line", "wrong", "traceback")
MAKERS = (
    wild_pictures.picture,
    wild_pictures.deep_picture,
    wild_pictures.raw_picture,
    wild_pictures.damaged_picture,
    wild_pictures.shallow_picture,
    wild_pictures.described_picture,
    wild_pictures.other_format,
    wild_cases.archive,
    wild_cases.packed,
    wild_cases.tree,
    wild_cases.identities,
    wild_cases.checkpoint,
    wild_cases.network,
    wild_cases.samples,
    wild_cases.argument,
    wild_habits.persons,
    wild_habits.places,
    wild_habits.pages,
    wild_habits.turned,
    wild_habits.parts,
    wild_habits.moments,
    wild_habits.numbers,
)


def main(arguments: list[str] | None = None) -> int:
    """Print a table by kind and every failure; 0 when there is none."""
    parser = argparse.ArgumentParser(prog="wild", description=__doc__)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--cases", type=int, default=CASES)
    chosen = parser.parse_args(arguments if arguments is not None else [])
    counts: Counter[tuple[str, str]] = Counter()
    for number, case in enumerate(draw(random.Random(chosen.seed), chosen.cases)):
        with scratch() as folder:
            outcome, told = run(case, folder)
        counts[case.kind, outcome] += 1
        if outcome in ("traceback", "wrong"):
            print(f"{outcome}: case {number}, {case.kind}: {told}")
    print(f"{'kind':<12}" + "".join(f"{name:>10}" for name in OUTCOMES))
    for kind in sorted({kind for kind, _ in counts}):
        print(f"{kind:<12}" + "".join(f"{counts[kind, name]:>10}" for name in OUTCOMES))
    bad = sum(count for (_, outcome), count in counts.items() if outcome in ("wrong", "traceback"))
    right = sum(counts.values()) - bad
    return verdict("odd inputs", f"{right} of {right + bad} right (seed {chosen.seed})", reached=not bad)


def run(case: Case, place: Path) -> tuple[str, str]:
    """What came of a case: `value` or `line` where that is right, else `wrong` or `traceback`, and why."""
    try:
        found = case.act(place)
    except (InputError, UnreadableImageError) as error:
        told = str(error)
        is_right = bool(case.line) and re.search(case.line, told) is not None and "\n" not in told
        return "line" if is_right else "wrong", told
    except Exception as error:  # every other class is what a user would see as a traceback
        return "traceback", f"{type(error).__name__}: {error}"
    if case.line:
        return "wrong", f"taken, though {case.line!r} should be said"
    return ("value", "") if found == case.value else ("wrong", f"{found!r} instead of {case.value!r}"[:300])


def draw(rng: random.Random, count: int) -> Iterator[Case]:
    """Cases of all kinds in turn."""
    yield from (MAKERS[number % len(MAKERS)](rng) for number in range(count))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
