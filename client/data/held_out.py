"""Which images were set aside for audits, and what is kept of a file so that later scans know it. No torch.

A record is an HMAC under the site's key: of a file's bytes, of pixels, of samples, of a person's name. Rows are
numbers of decoded images. Nothing that is decided for one person depends on another one's images in the same scan.
"""

import hashlib
import hmac
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

SCHEMA_VERSION = 2
Place = bool | None
"""True: held out; False: trained on; None: neither, or not known."""


class Picture(NamedTuple):
    """One decoded image: its row, the records that know it (bytes first), and that of its person, if it is known."""

    row: int
    records: tuple[str, ...]
    person: str | None


class Sides(NamedTuple):
    """Rows of a scan by what becomes of them."""

    train: list[int]
    """Trained on, each picture once."""
    twins: list[int]
    """Pictures of `train` that are filed under further persons: they belong to these persons' units, too."""
    held_out: list[int]
    """Never trained on, each picture once."""


@dataclass
class Split:
    """What was ever seen and where it was placed; what is decided once stays, also when images are added."""

    key_id: str = ""
    """Of the site's key; empty: from before keys had names."""
    records: dict[str, Place] = field(default_factory=dict)
    persons: dict[str, bool] = field(default_factory=dict)
    owners: dict[str, list[str]] | None = None
    """Persons that each record was filed under; None: not known."""

    @classmethod
    def load(cls, path: Path) -> "Split":
        """As it was saved, also by an earlier version."""
        tree: dict[str, Any] = json.loads(path.read_bytes())
        if tree.pop("schema", 1) == 1:
            return cls(records=tree["records"], persons=tree["persons"])
        return cls(**tree)

    def dump(self) -> bytes:
        """The bytes of its file; the same facts give the same bytes."""
        return json.dumps({"schema": SCHEMA_VERSION, **asdict(self)}, sort_keys=True).encode()

    def place_of(self, records: Iterable[str]) -> Place:
        """Where a picture was placed before, under any of its records; held out wins."""
        found = [place for record in records if (place := self.records.get(record)) is not None]
        return any(found) if found else None

    def is_regrouped(self, pictures: Sequence[Picture]) -> bool:
        """Whether pictures that were seen before are now filed under other persons only: another data set."""
        known = [each for each in pictures if any(record in self.records for record in each.records)]
        if self.owners is None:
            names = {each.person for each in known}
            return not names <= set(self.persons) if self.persons else bool(names - {None})
        now: dict[str, set[str]] = defaultdict(set)
        for each in known:
            for record in each.records:
                now[record].update([each.person] if each.person else [])
        before = {record: set(self.owners[record]) for record in now if record in self.owners}
        return any(bool(now[record]) != bool(old) or (old and not old & now[record]) for record, old in before.items())

    def divide(self, key: bytes, pictures: Sequence[Picture], ratio: float) -> Sides:
        """Place every picture and remember where.

        A person that is new goes where most of its known pictures are, else where its keyed hash says. A picture is
        trained on when its person is and it was never held out; it is held out when its person is and nobody's training
        has it.
        """
        distinct = [picture for group in _by_owner(pictures).values() for picture in first_of_each(group)]
        sides = {owner: self._side(key, owner, group, ratio) for owner, group in _by_owner(distinct).items()}
        places = {each.row: self.place_of(each.records) for each in distinct}
        training = [each for each in distinct if not sides[owner_of(each)] and places[each.row] is not True]
        train = first_of_each(training)
        taken = {record for each in training for record in each.records}
        aside = [each for each in distinct if sides[owner_of(each)] and places[each.row] is not False]
        held_out = first_of_each([each for each in aside if taken.isdisjoint(each.records)])
        self._remember(pictures, training, held_out, sides)
        rows = {each.row for each in train}
        return Sides(
            sorted(rows),
            sorted(each.row for each in training if each.row not in rows),
            sorted(each.row for each in held_out),
        )

    def _side(self, key: bytes, owner: str, group: list[Picture], ratio: float) -> bool:
        if owner in self.persons:
            return self.persons[owner]
        known = [place for each in group if (place := self.place_of(each.records)) is not None]
        return 2 * sum(known) >= len(known) if known else _chance(key, owner) < ratio

    def _remember(
        self, pictures: Sequence[Picture], training: list[Picture], held_out: list[Picture], sides: dict[str, bool]
    ) -> None:
        self.owners = self.owners or {}
        for each in pictures:
            for record in each.records:
                self.records.setdefault(record, None)
                owners = self.owners.setdefault(record, [])
                if each.person is not None:
                    self.persons[each.person] = sides[each.person]
                    self.owners[record] = sorted({*owners, each.person})
        for place, group in ((False, training), (True, held_out)):
            self.records.update({record: place for each in group for record in each.records})
        # A copy that was dropped goes where its picture went: it may be the one that is left next time.
        for each in pictures:
            place_now = self.place_of(each.records)
            self.records.update({record: place_now for record in each.records if self.records[record] is None})


def owner_of(picture: Picture) -> str:
    """Whose side a picture is on: its person's, or its own."""
    return picture.person or picture.records[0]


def first_of_each(pictures: Sequence[Picture]) -> list[Picture]:
    """Without those of which a record came before."""
    seen: set[str] = set()
    kept = []
    for picture in pictures:
        if seen.isdisjoint(picture.records):
            kept.append(picture)
        seen.update(picture.records)
    return kept


def recorder(key: bytes) -> Callable[[bytes], str]:
    """What is kept of some bytes: an HMAC under a key."""
    return lambda data: hmac.new(key, data, hashlib.sha256).hexdigest()


def _by_owner(pictures: Sequence[Picture]) -> dict[str, list[Picture]]:
    groups: dict[str, list[Picture]] = defaultdict(list)
    # Without persons all pictures are looked at together: a copy is no picture of its own.
    has_persons = any(each.person for each in pictures)
    for each in pictures if has_persons else first_of_each(pictures):
        groups[owner_of(each)].append(each)
    return groups


def _chance(key: bytes, name: str) -> float:
    return int.from_bytes(hmac.new(key, f"held out:{name}".encode(), hashlib.sha256).digest()[:8], "big") / 2**64
