"""Which images were set aside for audits, and what is kept of a file so that later scans know it. No torch."""

import hashlib
import hmac
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.settings import write_private


@dataclass
class Split:
    """Which records and persons were set aside; what is decided once stays, also when images are added."""

    records: dict[str, bool]
    persons: dict[str, bool]

    @classmethod
    def load(cls, path: Path) -> "Split":
        """As it was saved; empty before the first scan."""
        if not path.exists():
            return cls({}, {})
        return cls(**json.loads(path.read_bytes()))

    def save(self, path: Path) -> None:
        """Write it, 0600, in one step."""
        write_private(path, json.dumps({"records": self.records, "persons": self.persons}).encode())

    def place(self, key: bytes, pair: tuple[str, str], person: str | None, ratio: float) -> bool:
        """Whether a file is held out: as its bytes or pixels were before, else as its person is, else by keyed hash."""
        known = [self.records[record] for record in pair if record in self.records]
        name = pair[0] if person is None else record_of(key, person.encode())
        place = any(known) if known else self.persons.get(name, _chance(key, name) < ratio)
        if person is not None:
            self.persons.setdefault(name, place)
        self.records.update(dict.fromkeys(pair, place))
        return place


def first_of_each(records: list[tuple[str, str]]) -> NDArray[np.int64]:
    """Rows without those whose file or whose pixels came before."""
    seen: set[str] = set()
    keep = []
    for row, pair in enumerate(records):
        if seen.isdisjoint(pair):
            keep.append(row)
        seen.update(pair)
    return np.array(keep, np.int64)


def record_of(key: bytes, data: bytes) -> str:
    """What is kept of some bytes: an HMAC under the site's key."""
    return hmac.new(key, data, hashlib.sha256).hexdigest()


def _chance(key: bytes, name: str) -> float:
    return int.from_bytes(hmac.new(key, f"held out:{name}".encode(), hashlib.sha256).digest()[:8], "big") / 2**64
