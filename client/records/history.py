"""What the entries of a ledger say, and whether they are the newest that were ever written.

Links and charges of other homes count like the ledger's own. Nothing here writes to the ledger itself.
"""

import datetime as dt
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from client.private_files import write_private
from client.records.chain import ChainError, Entry, Head
from client.records.data_registry import DataRegistry
from client.records.spending import Charge, EpsilonOf, Spending, Total, merged, spending_of, total_of
from client.settings import Task, Unit
from shared.errors import InputError
from shared.experiment.config import Section

CLOCK_TOLERANCE = dt.timedelta(minutes=5)


class History:
    """Read-only view of a ledger's entries."""

    def __init__(self, entries: list[Entry]) -> None:
        self.entries = entries
        self._parsed: dict[int, tuple[Entry, Charge]] = {}

    @property
    def ledger_id(self) -> str | None:
        """Random name of this ledger, from its first entry."""
        return str(self.entries[0].fields["ledger_id"]) if self.entries else None

    @property
    def charges(self) -> list[tuple[Entry, Charge]]:
        """All reservations, oldest first."""
        return [self._charge(entry) for entry in self.entries if entry.kind == "reserve"]

    @property
    def newest_charge(self) -> Head | None:
        """Number and hash of the newest reservation."""
        return next((Head(e.sequence, e.hash) for e in reversed(self.entries) if e.kind == "reserve"), None)

    def has(self, head: Head) -> bool:
        """Whether the chain has gone through exactly this: an entry's hash covers all before it."""
        return head.sequence < len(self.entries) and self.entries[head.sequence].hash == head.hash

    def _charge(self, entry: Entry) -> tuple[Entry, Charge]:
        """Each entry is read once."""
        known = self._parsed.get(entry.sequence)
        if known is None or known[0] is not entry:
            known = self._parsed[entry.sequence] = (entry, Charge.model_validate(entry.fields))
        return known

    @property
    def committed(self) -> set[int]:
        """Sequence numbers of the reservations that were followed by a commit."""
        return {int(entry.fields["reserve"]) for entry in self.entries if entry.kind == "commit"}

    @property
    def dataset_ids(self) -> set[str]:
        """Every data set that was ever scanned here."""
        return {str(entry.fields["dataset_id"]) for entry in self._of_kind("dataset")}

    @property
    def key_id(self) -> str:
        """Of the site's key that the newest scan has used; empty before one said so."""
        return next((str(e.fields.get("key_id", "")) for e in reversed(self.entries) if e.kind == "dataset"), "")

    def registration(self, dataset_id: str) -> dict[str, Any] | None:
        """The newest facts of a data set as its last complete scan has left them; None when it was never scanned."""
        return next((e.fields for e in reversed(self.entries) if _is_registration(e, dataset_id)), None)

    @property
    def links(self) -> list[set[str]]:
        """Groups of data sets that share records, as each scan here or in another home has found them."""
        return [
            {entry.fields["dataset_id"], *entry.fields["linked"]}
            for entry in self.entries
            if entry.kind in ("dataset", "shared")
        ]

    def linked(self, dataset_id: str) -> set[str]:
        """The data sets that share records with this one, directly or through others, itself included."""
        return closure({dataset_id}, self.links)

    @property
    def inherited(self) -> list[tuple[Entry, Charge]]:
        """Charges that other homes of this machine have made on shared images."""
        return [(entry, Charge.model_validate(entry.fields["charge"])) for entry in self._of_kind("inherited")]

    def own_charges(self, dataset_id: str) -> list[tuple[Entry, Charge]]:
        """Charges on this very data set, whatever it shares with others."""
        return [each for each in self.charges if each[1].dataset_id == dataset_id]

    def charges_of(self, dataset_id: str) -> list[tuple[Entry, Charge]]:
        """Charges on the data set or on any that shares records with it, in this home or another."""
        linked = self.linked(dataset_id)
        return [each for each in [*self.charges, *self.inherited] if each[1].dataset_id in linked]

    def spending(self, dataset_id: str) -> list[Spending]:
        """The DP history, equal constants merged; order does not matter to epsilon."""
        return merged([spending_of(charge) for _, charge in self.charges_of(dataset_id) if charge.mechanism != "none"])

    def total(self, dataset_id: str, delta: float, epsilon_of: EpsilonOf) -> Total:
        """Everything spent so far on the data set."""
        charges = self.charges_of(dataset_id)
        return total_of([charge for _, charge in charges], delta, epsilon_of, self._num_uncommitted(charges))

    def unit_of(self, dataset_id: str) -> Unit | None:
        """The unit that the first DP charge has fixed, if there was one."""
        return next((charge.unit for _, charge in self.charges_of(dataset_id) if charge.mechanism != "none"), None)

    def plan_of(self, run: str) -> str | None:
        """Digest of the plan that the first round of a run has fixed."""
        return next((str(entry.fields["plan_digest"]) for entry in self.of_task("train", run)), None)

    def num_committed(self, run: str) -> int:
        """Rounds of a run that were completed."""
        committed = self.committed
        return sum(entry.sequence in committed for entry in self.of_task("train", run))

    def of_task(self, task: Task, run: str) -> list[Entry]:
        """Reservations of one kind of request for a run: questions name runs too, and are no rounds of theirs."""
        return [e for e in self._of_kind("reserve") if e.fields["task"] == task and e.fields["run"] == run]

    def num_since(self, moment: dt.datetime) -> int:
        """Reservations made after `moment`; entries with times in the future count."""
        written = zip(self.entries, self.times, strict=True)
        return sum(entry.kind == "reserve" and time > moment for entry, time in written)

    @property
    def times(self) -> list[dt.datetime]:
        """When each entry was written; one that a wrong clock has dated ahead, when the operator said so (`clock`)."""
        times, latest = [], dt.datetime.max.replace(tzinfo=dt.UTC)
        for entry in reversed(self.entries):
            latest = min(latest, entry.time) if entry.kind == "clock" else latest
            times.append(min(latest, entry.time))
        return times[::-1]

    def is_clock_behind(self, now: dt.datetime) -> bool:
        """Whether the clock stands before an entry: limits per day would not hold."""
        return bool(self.entries) and now < max(self.times) - CLOCK_TOLERANCE

    def _num_uncommitted(self, charges: list[tuple[Entry, Charge]]) -> int:
        committed = self.committed
        return sum(entry.kind == "reserve" and entry.sequence not in committed for entry, _ in charges)

    def _of_kind(self, kind: str) -> Iterator[Entry]:
        return (entry for entry in self.entries if entry.kind == kind)


def closure(start: set[str], links: list[set[str]]) -> set[str]:
    """Everything that hangs together with `start`, over any number of links."""
    found, size = set(start), -1
    while len(found) > size:
        size = len(found)
        found = found.union(*(link for link in links if link & found))
    return found


def _is_registration(entry: Entry, dataset_id: str) -> bool:
    return entry.kind == "dataset" and bool(entry.fields["dataset_id"] == dataset_id)


def check_head_file(head_path: Path, home: Path) -> None:
    """Refuse a head file that would be restored together with the ledger.

    Raises:
        InputError: it is not absolute, or lies somewhere in the ledger's folder.
    """
    if not head_path.is_absolute() or head_path.is_relative_to(home):
        raise InputError(f"head_file {str(head_path)!r}: give an absolute path outside {home}, the ledger's folder")


def head_problem(history: History, head_path: Path) -> str | None:
    """Why this copy is not the newest one, in one line; None when it is, or when nothing was ever written."""
    if not head_path.exists():
        if not any(entry.kind == "reserve" for entry in history.entries):
            return None
        return f"{head_path} is missing: is this the newest ledger? then `maskfed-client ledger verify --adopt`"
    try:
        kept = json.loads(head_path.read_bytes())
        seen, ledger_id = Head(int(kept["sequence"]), str(kept["hash"])), kept["ledger_id"]
    except (ValueError, TypeError, KeyError):
        return f"{head_path} is damaged: is this the newest ledger? then `maskfed-client ledger verify --adopt`"
    if history.ledger_id not in (None, ledger_id):
        return f"{head_path} belongs to another ledger: give each site its own head_file"
    size = len(history.entries)
    if seen.sequence < size:
        is_known = history.has(seen)
        return None if is_known else f"entry {seen.sequence} of the ledger is not the one seen: restore the newest copy"
    return (
        f"this ledger has {size} entries, one of {seen.sequence + 1} was seen: it is an older copy and has forgotten "
        "what was spent, restore the newest copy"
    )


def write_head(path: Path, ledger_id: str, head: Head) -> None:
    """Keep the newest head, 0600."""
    write_private(path, json.dumps({"ledger_id": ledger_id, **head._asdict()}).encode())


class _Shown(Section):
    """The newest charge that a ledger has shown the other homes, beside the file of all of them."""

    schema_version: int = Field(1, ge=1, le=1)
    sequence: int = Field(ge=0)
    hash: str
    charges_sha256: str


def show_charges(history: History, registry: DataRegistry) -> None:
    """Publish all charges of a ledger, and as the last step how its chain stands with the newest one."""
    newest = history.newest_charge
    data = registry.publish_charges(str(history.ledger_id), [(e.sequence, charge) for e, charge in history.charges])
    if newest is not None:
        shown = _Shown(**newest._asdict(), charges_sha256=hashlib.sha256(data).hexdigest())
        registry.write(f"{history.ledger_id}.head", shown.model_dump_json().encode())


def shown_head(history: History, registry: DataRegistry) -> Head | None:
    """The newest charge that a ledger has shown the other homes; None where nothing, or nothing complete, is shown.

    What was shown must be here, or another copy of this ledger has gone on alone. Each line of a chain has a salt, so
    the hash tells two copies apart that were charged for the same request, too.

    Raises:
        ChainError: it is not.
        InputError: a file of the registry is damaged.
    """
    names = [f"{history.ledger_id}.{kind}" for kind in ("head", "charges")]
    shown = registry.load(names[0], _Shown) if (registry.folder / names[0]).exists() else None
    head = Head(shown.sequence, shown.hash) if shown else None
    # The hash covers all charges, so they are read only where the two files are not of one writing.
    data = registry.read(names[1]) if shown and (registry.folder / names[1]).exists() else b""
    is_whole = shown is not None and hashlib.sha256(data).hexdigest() == shown.charges_sha256
    published = () if is_whole else registry.charges(str(history.ledger_id))
    own = [] if is_whole else [(entry.sequence, charge) for entry, charge in history.charges]
    if (head and not history.has(head)) or list(published) != own[: len(published)]:
        raise ChainError(
            f"{registry.folder} knows charges of this ledger that are not in it: it is an older copy, or a copy of "
            "another home that is in use; restore the newest, a second home needs `enroll` and `join` of its own"
        )
    return head if is_whole else None
