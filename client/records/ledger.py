"""What has been spent of each data set's privacy, on disk before it is spent.

Charges are append-only entries of a hash chain (`chain.py`). A charge is reserved before the first gradient; without a
later `commit` it counts all the same. The newest sequence number and hash are also kept in a head file elsewhere and
travel in replies, so that a restored older copy is noticed. This module knows no accountant: the function that turns a
history into epsilon is handed in, so that a refusal costs no import of torch.
"""

import datetime as dt
import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from client.records.chain import Chain, ChainError, Entry, Head, open_chain, read_chain
from client.records.spending import Charge, EpsilonOf, Spending, Total, merged, spending_of, total_of
from client.settings import Unit, write_private
from shared.errors import InputError

CLOCK_TOLERANCE = dt.timedelta(minutes=5)


class BudgetError(InputError):
    """The charge would pass the cap; nothing was written."""

    def __init__(self, epsilon: float, cap: float, unit: Unit) -> None:
        super().__init__(f"epsilon per {unit} would be {epsilon:.3f}, the cap is {cap:g}: the round is refused")
        self.epsilon, self.cap = epsilon, cap


class UnitError(InputError):
    """The data set's spending is counted per image, the charge per person, or the other way round."""


class History:
    """Read-only view of a ledger's entries."""

    def __init__(self, entries: list[Entry]) -> None:
        self.entries = entries

    @property
    def ledger_id(self) -> str | None:
        """Random name of this ledger, from its first entry."""
        return str(self.entries[0].fields["ledger_id"]) if self.entries else None

    @property
    def charges(self) -> list[tuple[Entry, Charge]]:
        """All reservations, oldest first."""
        return [(entry, Charge.model_validate(entry.fields)) for entry in self.entries if entry.kind == "reserve"]

    @property
    def committed(self) -> set[int]:
        """Sequence numbers of the reservations that were followed by a commit."""
        return {int(entry.fields["reserve"]) for entry in self.entries if entry.kind == "commit"}

    @property
    def dataset_ids(self) -> set[str]:
        """Every data set that was ever scanned here."""
        return {str(entry.fields["dataset_id"]) for entry in self._of_kind("dataset")}

    def linked(self, dataset_id: str) -> set[str]:
        """The data sets that share records with this one, directly or through others, itself included."""
        links = [{entry.fields["dataset_id"], *entry.fields["linked"]} for entry in self._of_kind("dataset")]
        found, size = {dataset_id}, 0
        while len(found) > size:
            size = len(found)
            found = found.union(*(link for link in links if link & found))
        return found

    def charges_of(self, dataset_id: str) -> list[tuple[Entry, Charge]]:
        """Charges on the data set or on any that shares records with it."""
        linked = self.linked(dataset_id)
        return [
            (entry, Charge.model_validate(entry.fields))
            for entry in self._of_kind("reserve")
            if entry.fields["dataset_id"] in linked
        ]

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
        """Digest of the plan that the first charge of a run has fixed."""
        return next((str(e.fields["plan_digest"]) for e in self._of_kind("reserve") if e.fields["run"] == run), None)

    def num_committed(self, run: str) -> int:
        """Rounds of a run that were completed."""
        committed = self.committed
        return sum(e.fields["run"] == run and e.sequence in committed for e in self._of_kind("reserve"))

    def num_since(self, moment: dt.datetime) -> int:
        """Reservations made after `moment`; entries with times in the future count."""
        return sum(entry.time > moment for entry in self._of_kind("reserve"))

    def _num_uncommitted(self, charges: list[tuple[Entry, Charge]]) -> int:
        committed = self.committed
        return sum(entry.sequence not in committed for entry, _ in charges)

    def _of_kind(self, kind: str) -> Iterator[Entry]:
        return (entry for entry in self.entries if entry.kind == kind)


class Ledger(History):
    """The ledger, held by this process alone; see `open_ledger`."""

    def __init__(self, chain: Chain, head_path: Path) -> None:
        super().__init__(chain.entries)
        self._chain, self._head_path = chain, head_path

    @property
    def head(self) -> Head:
        """Newest sequence number and hash, as sent in replies."""
        head = self._chain.head
        assert head is not None, "open_ledger writes the first entry"
        return head

    def is_clock_behind(self, now: dt.datetime) -> bool:
        """Whether the clock stands before the newest entry: limits per day would not hold."""
        return now < self.entries[-1].time - CLOCK_TOLERANCE

    def register(self, dataset_id: str, linked: list[str], fingerprint: str) -> None:
        """Record a data set and those it shares records with; the same facts twice are one entry."""
        fields = {"dataset_id": dataset_id, "linked": sorted(linked), "fingerprint": fingerprint}
        if all(entry.fields != fields for entry in self._of_kind("dataset")):
            self._append("dataset", **fields)

    def reserve(self, charge: Charge, *, cap: float, delta: float, epsilon_of: EpsilonOf) -> tuple[Entry, Total]:
        """Charge the data set before anything is computed from it; durable when this returns.

        Args:
            charge: what will be released.
            cap: largest total epsilon; no limit on charges without DP, those are the policy's to forbid.
            delta: the site's delta.
            epsilon_of: the accountant.

        Returns:
            The entry, for `commit`, and the total that includes it.

        Raises:
            BudgetError: the total would pass the cap.
            UnitError: earlier charges were counted in another unit.
            OSError: not written (disk full).
        """
        earlier = self.charges_of(charge.dataset_id)
        unit = next((other.unit for _, other in earlier if other.mechanism != "none"), None)
        if charge.mechanism != "none" and unit not in (None, charge.unit):
            raise UnitError(f"spending is counted per {unit}, asked is per {charge.unit}: ask for the same unit")
        charges = [*(other for _, other in earlier), charge]
        total = total_of(charges, delta, epsilon_of, self._num_uncommitted(earlier) + 1)
        if charge.mechanism != "none" and not total.epsilon <= cap:
            raise BudgetError(total.epsilon, cap, charge.unit)
        return self._append("reserve", **charge.model_dump(mode="json")), total

    def commit(self, reservation: Entry) -> None:
        """Record that a reserved release was made. A second commit of the same reservation writes nothing."""
        if reservation.sequence not in self.committed:
            self._append("commit", reserve=reservation.sequence)

    def _append(self, kind: str, **fields: object) -> Entry:
        entry = self._chain.append(kind, **fields)
        _write_head(self._head_path, str(self.ledger_id), self.head)
        return entry


@contextmanager
def open_ledger(path: Path, head_path: Path, *, adopt: bool = False) -> Iterator[Ledger]:
    """Open the ledger for spending, under its lock; the first opening creates it.

    Args:
        path: the ledger file.
        head_path: file that keeps the newest head of this one ledger, in another folder than the ledger's.
        adopt: accept this copy although its head is missing or newer; records the fact in the ledger.

    Raises:
        BusyError: another process holds it.
        ChainError: damaged, or behind the highest head seen (a restored backup).
    """
    check_head_file(head_path, path.parent)
    with open_chain(path, wait=False) as chain:
        problem = head_problem(History(chain.entries), head_path)
        if problem and not adopt:
            raise ChainError(problem)
        if not chain.entries:
            chain.append("open", ledger_id=secrets.token_hex(16))
        if problem:
            chain.append("adopted", problem=problem)
        ledger = Ledger(chain, head_path)
        _write_head(head_path, str(ledger.ledger_id), ledger.head)
        yield ledger


def check_head_file(head_path: Path, home: Path) -> None:
    """Refuse a head file that would be restored together with the ledger.

    Raises:
        InputError: it is not absolute, or lies somewhere in the ledger's folder.
    """
    if not head_path.is_absolute() or head_path.is_relative_to(home):
        raise InputError(f"head_file {str(head_path)!r}: give an absolute path outside {home}, the ledger's folder")


def read_ledger(path: Path) -> History:
    """The ledger as it is on disk, checked, without locking it.

    Raises:
        ChainError: damaged.
    """
    return History(read_chain(path))


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
    entries = history.entries
    if seen.sequence < len(entries):
        is_known = entries[seen.sequence].hash == seen.hash
        return None if is_known else f"entry {seen.sequence} of the ledger is not the one seen: restore the newest copy"
    return (
        f"this ledger has {len(entries)} entries, one of {seen.sequence + 1} was seen: it is an older copy and has "
        "forgotten what was spent, restore the newest copy"
    )


def _write_head(path: Path, ledger_id: str, head: Head) -> None:
    write_private(path, json.dumps({"ledger_id": ledger_id, **head._asdict()}).encode())
