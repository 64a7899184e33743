"""What the operator has approved, one digest per line in `approved.txt`.

Client code, experiments, projections of private statistics, the public reference models of audits, and the sites that
this one adds up with.
"""

import datetime as dt
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from client.home import Home
from client.policy.refusals import RefusedError
from client.policy.rules import is_any_allowed
from client.private_files import check_private, one_at_a_time, write_private
from client.settings import SiteConfig, SitePolicy
from shared.errors import InputError
from shared.experiment.config import Experiment
from shared.messages.training import experiment_digest

MOST_PENDING = 20
"""Older waiting experiments are dropped: a coordinator must not fill the disk."""
NUMBER_FILE = "number"
"""Beside them: the newest number that was given to one."""
MOST_DIGITS = 9
Kind = Literal["code", "experiment", "projection", "reference", "refused", "peer"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_OPPOSITES: dict[Kind, Kind] = {"experiment": "refused", "refused": "experiment"}


@dataclass(frozen=True)
class Approved:
    """Accepted digests, 64 hexadecimal digits each."""

    code: frozenset[str] = frozenset()
    experiments: frozenset[str] = frozenset()
    projections: frozenset[str] = frozenset()
    references: frozenset[str] = frozenset()
    refused: frozenset[str] = frozenset()
    """Experiments that the operator has decided against: they wait no more."""
    peers: frozenset[str] = frozenset()
    """Sites, by name and key, whose updates this site's may be added to."""


def read_approved(home: Home) -> Approved:
    """Read `approved.txt`; a missing file approves nothing.

    Raises:
        InputError: others can change the file, or a line is not `<kind> <digest>`.
    """
    if not home.approved.exists():
        return Approved()
    check_private(home.approved)
    found: dict[str, set[str]] = {kind: set() for kind in KINDS}
    for number, line in enumerate(home.approved.read_text(encoding="utf-8").splitlines(), 1):
        kind, _, digest = line.partition(" ")
        if kind not in found or not _is_digest(digest):
            raise InputError(f"{home.approved}: line {number} is not one of {', '.join(KINDS)} and a sha256")
        found[kind].add(digest)
    return Approved(*(frozenset(found[kind]) for kind in KINDS))


def approve(home: Home, kind: Kind, digest: str) -> None:
    """Add a digest; the same twice is one line. An experiment that is decided on no longer waits.

    `experiment` and `refused` exclude each other: the last word counts.
    """
    if not _is_digest(digest):
        raise InputError(f"digest {digest[:70]!r}: give 64 hexadecimal digits")
    lines = home.approved.read_text(encoding="utf-8").splitlines() if home.approved.exists() else []
    line, opposite = f"{kind} {digest}", f"{_OPPOSITES.get(kind)} {digest}"
    if line not in lines or opposite in lines:
        kept = [each for each in lines if each not in (line, opposite)]
        write_private(home.approved, "".join(f"{each}\n" for each in [*kept, line]).encode())
    pending_file(home, digest).unlink(missing_ok=True)


def revoke(home: Home, digest: str) -> bool:
    """Remove a digest; false when it was not approved."""
    lines = home.approved.read_text(encoding="utf-8").splitlines() if home.approved.exists() else []
    kept = [line for line in lines if line.partition(" ")[2] != digest]
    if len(kept) == len(lines):
        return False
    write_private(home.approved, "".join(f"{line}\n" for line in kept).encode())
    return True


def require_approved(home: Home, settings: SiteConfig, kind: Kind, digest: str) -> None:
    """Refuse what needs the operator's approval and has none; where any experiment may run, anything may.

    Raises:
        RefusedError: with the digest to approve.
    """
    approved = read_approved(home)
    known = {"projection": approved.projections, "reference": approved.references}.get(kind, approved.experiments)
    if digest not in known and not is_any_allowed(settings.policy, approved.refused):
        raise RefusedError("experiment_not_approved", f"the site's operator has not approved the {kind} {digest}")


def may_run(home: Home, policy: SitePolicy, experiment: Experiment) -> bool:
    """Whether the operator lets an experiment run at this moment: what he has taken back also stops what was kept."""
    approved = read_approved(home)
    return is_any_allowed(policy, approved.refused) or experiment_digest(experiment) in approved.experiments


def keep_pending(home: Home, experiment: Experiment, run: str) -> None:
    """Keep an experiment that `run` has asked for, so that the operator can decide; one that he has refused is not."""
    digest = experiment_digest(experiment)
    path = pending_file(home, digest)
    if not path.exists() and digest not in read_approved(home).refused:
        asked = dt.datetime.now(dt.UTC).strftime("%Y-%m-%d %H:%M")
        with one_at_a_time(home.pending / NUMBER_FILE):
            head = {"run": run, "asked": asked, "number": _new_number(home)}
            write_private(path, f"# {json.dumps(head)}\n{experiment.to_toml()}".encode())
        for old in pending(home)[MOST_PENDING:]:
            old.unlink(missing_ok=True)


class PendingHead(NamedTuple):
    """What is known of an experiment that waits, besides itself."""

    run: str = ""
    """That asked first; empty for a file of an older version."""
    asked: str = ""
    """When, in UTC."""
    number: int = 0
    """Its own, never another's; 0: it has none, for an older version wrote the file."""


def pending_head(path: Path) -> PendingHead:
    """From the first line of a waiting experiment's file; a line that cannot be read says nothing."""
    try:
        told = json.loads(path.read_text(encoding="utf-8").split("\n", 1)[0].removeprefix("# "))
        return PendingHead(str(told["run"]), str(told["asked"]), max(0, int(told.get("number", 0))))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return PendingHead()


def _new_number(home: Home) -> int:
    """One that no experiment has had here: what the operator has read of one must never mean another.

    Whoever asks may ask often, so that what waits longest is dropped and all others would move up.
    """
    file = home.pending / NUMBER_FILE
    try:
        last = int(file.read_text(encoding="ascii")[:MOST_DIGITS])
    except (OSError, ValueError):
        last = 0
    number = 1 + max(last, *(pending_head(path).number for path in pending(home)), 0)
    write_private(file, str(number).encode())
    return number


def pending(home: Home) -> list[Path]:
    """Files of the experiments that wait, newest first; each is named by its digest."""
    found = home.pending.glob("*.toml") if home.pending.exists() else iter(())
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def pending_file(home: Home, digest: str) -> Path:
    """Where an experiment waits."""
    return home.pending / f"{digest}.toml"


def _is_digest(text: str) -> bool:
    return len(text) == 64 and set(text) <= set("0123456789abcdef")
