"""Attacks of a coordinator that cheats on the privacy promises of a site, each judged against the epsilon charged.

Every module here that attacks has `ATTACKS`: name to a function of (trials, is_guarded, seed). With the guard off an
attack has to succeed, which the tests show at few trials: an attack that never works proves nothing.
"""

import argparse
import dataclasses
import importlib
import json
import logging
import pkgutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import privacy_attacks
from benchmarks.measure import verdict
from benchmarks.privacy_attacks.outcome import Outcome
from shared.storage.versions import git_commit

SEED = 0
ROUNDS = 200
NEEDED_OFF = 0.95
"""Share of right guesses that shows an attack to work once its guard is off."""
Attack = Callable[[int, bool, int], Outcome]


def main(arguments: Sequence[str] = ()) -> int:
    """Print each attack's success beside what its epsilon allows; 0 when none is above."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.privacy_attacks", description=__doc__)
    parser.add_argument("names", nargs="*", help="attacks to run; default: all")
    parser.add_argument("--trials", type=int, default=ROUNDS)
    parser.add_argument("--off", action="store_true", help="without the guards: every attack has to succeed")
    parser.add_argument("--keep", type=Path, help="file of finished attacks: those of this commit are not run again")
    options = parser.parse_args(arguments)
    attacks = collect()
    if unknown := sorted(set(options.names) - set(attacks)):
        parser.error(f"no attack {unknown[0]!r}: there are {', '.join(attacks)}")
    logging.disable(logging.ERROR)  # what a site notes of each refusal
    outcomes = []
    print(f"{'attack':36} trials  right  at least  allowed  epsilon")
    for name in options.names or attacks:
        call = (options.trials, not options.off, SEED)
        outcomes.append(kept(options.keep, name, call) or keep(options.keep, name, call, attacks[name](*call)))
        print(line(outcomes[-1]), flush=True)
    if options.off:
        return succeed(outcomes)
    above = [outcome.name for outcome in outcomes if not outcome.is_held]
    text = f"{len(above)} of {len(outcomes)} above what epsilon allows in {options.trials} trials (needs 0)"
    return verdict("privacy attacks", text + "".join(f", {name}" for name in above), reached=not above)


def kept(file: Path | None, name: str, call: Sequence[int]) -> Outcome | None:
    """What an earlier run of this commit found, if it got that far."""
    lines = file.read_text(encoding="utf-8").splitlines() if file and file.exists() else []
    for each in map(json.loads, lines):
        if each["key"] == [git_commit(), name, *call]:
            return Outcome(**each["outcome"])
    return None


def keep(file: Path | None, name: str, call: Sequence[int], outcome: Outcome) -> Outcome:
    """Write a finished attack down, so that a run that was ended goes on after it."""
    if file:
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"key": [git_commit(), name, *call], "outcome": dataclasses.asdict(outcome)}) + "\n")
    return outcome


def succeed(outcomes: Sequence[Outcome]) -> int:
    """The last line where guards are off."""
    weak = [outcome.name for outcome in outcomes if outcome.correct < NEEDED_OFF * outcome.trials]
    strong, trials = len(outcomes) - len(weak), outcomes[0].trials
    text = f"guards off: {strong} of {len(outcomes)} right in {NEEDED_OFF:.0%} of {trials} trials"
    return verdict("privacy attacks", text + "".join(f", not {name}" for name in weak), reached=not weak)


def collect() -> dict[str, Attack]:
    """The attacks of all modules of this package."""
    names = sorted(each.name for each in pkgutil.iter_modules(privacy_attacks.__path__) if each.name != "__main__")
    modules = [importlib.import_module(f"{privacy_attacks.__name__}.{name}") for name in names]
    return {name: attack for module in modules for name, attack in getattr(module, "ATTACKS", {}).items()}


def line(outcome: Outcome) -> str:
    """A row of the table."""
    return (
        f"{outcome.name:36} {outcome.trials:6d} {outcome.correct:6d} {outcome.lowest_success:9.3f} "
        f"{outcome.allowed_success:8.3f} {outcome.epsilon:8.3f}{'' if outcome.is_held else '  ABOVE'}"
        f"{'  ' if outcome.remark else ''}{outcome.remark}"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
