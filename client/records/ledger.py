"""What has been spent of each data set's privacy, on disk before it is spent.

Charges are append-only entries of a hash chain (`chain.py`). A charge is reserved before the first gradient; without a
later `commit` it counts all the same. The newest sequence number and hash are also kept in a head file elsewhere and
travel in replies, so that a restored older copy is noticed. What other homes of this machine have charged on shared
images is taken over from the registry, as entries `inherited`. This module knows no accountant: the function that turns
a history into epsilon is handed in, so that a refusal costs no import of torch.
"""

import datetime as dt
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from client.records.chain import Chain, ChainError, Entry, Head, open_chain, read_chain
from client.records.data_registry import DataRegistry, existing_registry
from client.records.history import (
    CLOCK_TOLERANCE,
    History,
    check_head_file,
    closure,
    head_problem,
    show_charges,
    shown_head,
    write_head,
)
from client.records.spending import Charge, EpsilonOf, Total, total_of
from client.settings import Unit
from shared.errors import InputError


class BudgetError(InputError):
    """The charge would pass the cap; nothing was written."""

    def __init__(self, epsilon: float, cap: float, unit: Unit) -> None:
        super().__init__(f"epsilon per {unit} would be {epsilon:.3f}, the cap is {cap:g}: the round is refused")
        self.epsilon, self.cap = epsilon, cap


class UnitError(InputError):
    """The data set's spending is counted per image, the charge per person, or the other way round."""


class OutdatedDataError(InputError):
    """The images were scanned again since they were opened."""


class ClockError(InputError):
    """The clock stands before an entry: limits per day would not hold, and old questions would be new again."""


class Ledger(History):
    """The ledger, held by this process alone; see `open_ledger`."""

    def __init__(self, chain: Chain, head_path: Path, registry: DataRegistry | None = None) -> None:
        super().__init__(chain.entries)
        self._chain, self._head_path, self._registry = chain, head_path, registry

    @property
    def head(self) -> Head:
        """Newest sequence number and hash, as sent in replies."""
        head = self._chain.head
        assert head is not None, "open_ledger writes the first entry"
        return head

    def register(
        self,
        dataset_id: str,
        linked: list[str],
        fingerprint: str,
        *,
        key_id: str = "",
        mapping: str = "",
        machine_key_id: str = "",
    ) -> None:
        """Record what a scan has found; the same facts twice in a row are one entry.

        Args:
            dataset_id: random name of the data set.
            linked: data sets it shares records with.
            fingerprint: names the generation of images that alone may be opened from now on.
            key_id: of the site's key, under which the records are.
            mapping: digest of which file shows which person; empty without persons.
            machine_key_id: of the machine's key, under which the registry knows the data set.
        """
        fields = {"dataset_id": dataset_id, "linked": sorted(linked), "fingerprint": fingerprint}
        fields |= {"key_id": key_id, "mapping": mapping, "machine_key_id": machine_key_id}
        if self.registration(dataset_id) != fields:
            self._append("dataset", **fields)

    def accept_clock(self, now: dt.datetime) -> Entry:
        """Record that the clock is right and entries are dated ahead: they count as written now, none is forgotten.

        Raises:
            InputError: no entry is dated ahead.
        """
        if not self.is_clock_behind(now):
            raise InputError(f"no entry of the ledger is dated after {now:%Y-%m-%d %H:%M} UTC: nothing to accept")
        newest = max(self.times)
        return self._append(
            "clock", newest=newest.isoformat(), num_ahead=sum(time > now + CLOCK_TOLERANCE for time in self.times)
        )

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
            OutdatedDataError: the charge names another generation of the images than the newest scan.
            ClockError: the clock stands before an entry.
            OSError: not written (disk full).
        """
        with self._alone_on_this_machine():
            self._check_clock(dt.datetime.now(dt.UTC))
            known = self.registration(charge.dataset_id)
            if known is not None and known["fingerprint"] != charge.fingerprint:
                raise OutdatedDataError("the images were scanned again meanwhile: nothing was charged, ask again")
            earlier = self.charges_of(charge.dataset_id)
            self._check_unit(charge, earlier)
            charges = [*(other for _, other in earlier), charge]
            total = total_of(charges, delta, epsilon_of, self._num_uncommitted(earlier) + 1)
            if charge.mechanism != "none" and not total.epsilon <= cap:
                raise BudgetError(total.epsilon, cap, charge.unit)
            return self._append("reserve", **charge.model_dump(mode="json")), total

    def commit(self, reservation: Entry) -> None:
        """Record that a reserved release was made. A second commit of the same reservation writes nothing."""
        if reservation.sequence not in self.committed:
            self._append("commit", reserve=reservation.sequence)

    def take_over(self) -> None:
        """Enter what other homes of this machine have charged on images that are here, too, and show them our own."""
        with self._alone_on_this_machine():
            pass

    def _check_clock(self, now: dt.datetime) -> None:
        if self.is_clock_behind(now):
            raise ClockError(
                f"the clock says {now:%Y-%m-%d %H:%M} UTC, before an entry of the ledger: set it, or, if it was wrong "
                "then, `maskfed-client ledger accept-clock`"
            )

    def check_newest(self) -> None:
        """Refuse a copy of which the machine knows a newer one, before anything is written into it.

        Raises:
            ChainError: charges that this ledger has published are not in it.
        """
        if self._registry is not None and self.entries:
            with self._registry.locked():
                shown_head(self, self._registry)

    @staticmethod
    def _check_unit(charge: Charge, earlier: list[tuple[Entry, Charge]]) -> None:
        unit = next((other.unit for _, other in earlier if other.mechanism != "none"), None)
        if charge.mechanism != "none" and unit not in (None, charge.unit):
            raise UnitError(f"spending is counted per {unit}, asked is per {charge.unit}: ask for the same unit")

    @contextmanager
    def _alone_on_this_machine(self) -> Iterator[None]:
        """No other home charges meanwhile; what they have charged before is here, what we charge will be there."""
        if self._registry is None:
            yield
            return
        with self._registry.locked():
            shown = shown_head(self, self._registry)
            self._inherit(self._registry)
            yield
            if self.newest_charge != shown:
                show_charges(self, self._registry)

    def _inherit(self, registry: DataRegistry) -> None:
        identities = registry.identities()
        links = [{each.dataset_id, *each.linked} for each in identities.values()]
        found = closure(self.dataset_ids, [*self.links, *links])
        others = [each for each in identities.values() if each.dataset_id in found and each.ledger_id != self.ledger_id]
        known = {(entry.fields["dataset_id"], *entry.fields["linked"]) for entry in self._of_kind("shared")}
        for each in others:
            if (each.dataset_id, *sorted(each.linked)) not in known:
                self._append("shared", dataset_id=each.dataset_id, linked=sorted(each.linked), home=each.home)
        taken = {(entry.fields["ledger_id"], entry.fields["sequence"]) for entry, _ in self.inherited}
        for ledger_id in sorted({each.ledger_id for each in others}):
            for sequence, charge in registry.charges(ledger_id):
                if charge.dataset_id in found and (ledger_id, sequence) not in taken:
                    fields = {"ledger_id": ledger_id, "sequence": sequence}
                    self._append("inherited", **fields, charge=charge.model_dump(mode="json"))

    def _append(self, kind: str, **fields: object) -> Entry:
        entry = self._chain.append(kind, **fields)
        write_head(self._head_path, str(self.ledger_id), self.head)
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
        ledger = Ledger(chain, head_path, existing_registry())
        problem = head_problem(ledger, head_path)
        if problem and not adopt:
            raise ChainError(problem)
        ledger.check_newest()
        if not chain.entries:
            chain.append("open", ledger_id=secrets.token_hex(16))
        if problem:
            chain.append("adopted", problem=problem)
        write_head(head_path, str(ledger.ledger_id), ledger.head)
        ledger.take_over()
        yield ledger


def read_ledger(path: Path) -> History:
    """The ledger as it is on disk, checked, without locking it.

    Raises:
        ChainError: damaged.
    """
    return History(read_chain(path))
