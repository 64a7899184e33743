"""The site's images: decoded once into a private file, duplicates dropped, a share of the persons set aside.

A data set has a random id that never changes, so that images added later inherit all spending. What is kept of each
file are HMACs under the site's key: they tell a later scan what it has seen, and nothing to anybody else. No torch.
"""

import hashlib
import hmac
import json
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.ledger import open_ledger
from client.settings import Home, SiteConfig, Unit, private_files, read_data_key, write_private
from shared.cache import build_cache, open_cache
from shared.errors import InputError
from shared.images import ImageSource, list_images, read_identities
from shared.imageset import ImageCache

SCHEMA_VERSION = 1
Ids = NDArray[np.int64]


class NotScannedError(InputError):
    """There is no data set of the size that is asked for, or what a scan wrote is damaged: scan (again)."""


@dataclass(frozen=True)
class Dataset:
    """A scanned data set at one image size. Rows are numbers of images in `images`."""

    dataset_id: str
    fingerprint: str
    size: int
    train: Ids
    held_out: Ids
    persons: Ids | None
    """Person of each row, or None where images are not sorted by person."""
    images: ImageCache

    def units(self, unit: Unit) -> list[Ids]:
        """Training rows of each unit of privacy: one image each, or all images of one person.

        Raises:
            InputError: persons are asked for and not known.
        """
        if unit == "image":
            return list(self.train.reshape(-1, 1))
        if self.persons is None:
            raise InputError("the images are not sorted by person: give one folder per person, or `identities`")
        order = np.argsort(self.persons[self.train], kind="stable")
        rows = self.train[order]
        borders = np.flatnonzero(np.diff(self.persons[rows])) + 1
        return [group for group in np.split(rows, borders) if len(group)]


@dataclass(frozen=True)
class Scan:
    """What `data scan` shows to the operator; nothing of it leaves the site."""

    dataset_id: str
    size: int
    num_train: int
    num_held_out: int
    num_persons: int | None
    num_held_out_persons: int | None
    num_duplicates: int
    num_unreadable: int
    linked: list[str]
    """Other data sets that share files: their spending counts here, and this one's there."""


def scan(
    home: Home, settings: SiteConfig, *, is_new: bool = False, on_progress: Callable[[int, int], None] | None = None
) -> Scan:
    """Index the folder of `site.toml`; safe to interrupt and to repeat. No round can start meanwhile.

    Args:
        home: the site.
        settings: names folder, size and held-out share.
        is_new: begin another data set instead of going on with the current one.
        on_progress: told files done and in all.

    Raises:
        InputError: no usable images, or none left to train on.
        BusyError: a round is running.
    """
    with private_files(), open_ledger(home.ledger, Path(settings.head_file)) as ledger:
        current = None if is_new else current_id(home)
        dataset_id = current or secrets.token_hex(16)
        folder = home.datasets / dataset_id
        folder.mkdir(parents=True, exist_ok=True)
        source = list_images(Path(settings.data))
        identities = Path(settings.identities) if settings.identities else None
        images = build_cache(
            source.path,
            folder / f"images-{settings.image_size}",
            settings.image_size,
            identities=identities,
            on_progress=on_progress,
        )
        key = read_data_key(home)
        persons = _persons_of(source, images, identities)
        records = [
            (_record(key, source.read(name)), _record(key, pixels.tobytes()))
            for name, pixels in zip(images.names, images.images, strict=True)
        ]
        keep = _first_of_each(records)
        split = _Split.load(folder / "split.json")
        is_held_out = np.array(
            [split.place(key, records[row], persons[row] if persons else None, settings.held_out_ratio) for row in keep]
        )
        if is_held_out.all():
            raise InputError(
                f"held_out_ratio {settings.held_out_ratio} sets all {len(keep)} images of {source.path} aside: nothing "
                "is left to train on, lower it or add persons"
            )
        fingerprint = hmac.new(key, "\n".join(sorted(records[row][0] for row in keep)).encode(), hashlib.sha256)
        linked = sorted(_sharing(home, ledger.dataset_ids - {dataset_id}, set(split.records)))
        index = {
            "schema": SCHEMA_VERSION,
            "dataset_id": dataset_id,
            "fingerprint": fingerprint.hexdigest(),
            "train": keep[~is_held_out].tolist(),
            "held_out": keep[is_held_out].tolist(),
        }
        # The split first: what was set aside once must never be trained on, whatever happens next.
        split.save(folder / "split.json")
        ledger.register(dataset_id, linked, fingerprint.hexdigest())
        write_private(folder / f"index-{settings.image_size}.json", json.dumps(index).encode())
        write_private(home.datasets / "current", dataset_id.encode())
    num_held_out = int(is_held_out.sum())
    codes = None if images.persons is None else images.persons[keep]
    return Scan(
        dataset_id=dataset_id,
        size=settings.image_size,
        num_train=len(keep) - num_held_out,
        num_held_out=num_held_out,
        num_persons=None if codes is None else len(np.unique(codes)),
        num_held_out_persons=None if codes is None else len(np.unique(codes[is_held_out])),
        num_duplicates=len(images) - len(keep),
        num_unreadable=images.num_unreadable,
        linked=linked,
    )


def current_id(home: Home) -> str | None:
    """Id of the data set in use; None before the first scan."""
    path = home.datasets / "current"
    return path.read_text(encoding="ascii").strip() if path.exists() else None


def open_dataset(home: Home, size: int) -> Dataset:
    """The current data set at `size` pixels; only its index is read.

    Raises:
        NotScannedError: not scanned at this size, or the cache is damaged.
    """
    dataset_id = current_id(home)
    path = home.datasets / str(dataset_id) / f"index-{size}.json"
    if dataset_id is None or not path.exists():
        raise NotScannedError(f"no images of {size} pixels are scanned: run `maskfed-client data scan`")
    try:
        index: dict[str, Any] = json.loads(path.read_bytes())
    except ValueError as error:
        raise NotScannedError(f"{path} is damaged: run `maskfed-client data scan`") from error
    if index.get("schema") != SCHEMA_VERSION:
        raise NotScannedError(f"{path} has schema {index.get('schema')}: run `maskfed-client data scan`")
    try:
        images = open_cache(path.parent / f"images-{size}", check_source=False)
    except InputError as error:
        raise NotScannedError(str(error)) from error
    return Dataset(
        dataset_id=dataset_id,
        fingerprint=index["fingerprint"],
        size=size,
        train=np.array(index["train"], np.int64),
        held_out=np.array(index["held_out"], np.int64),
        persons=images.persons,
        images=images,
    )


@dataclass
class _Split:
    """Which records and persons were set aside; what is decided once stays, also when images are added."""

    records: dict[str, bool]
    persons: dict[str, bool]

    @classmethod
    def load(cls, path: Path) -> "_Split":
        if not path.exists():
            return cls({}, {})
        return cls(**json.loads(path.read_bytes()))

    def save(self, path: Path) -> None:
        write_private(path, json.dumps({"records": self.records, "persons": self.persons}).encode())

    def place(self, key: bytes, pair: tuple[str, str], person: str | None, ratio: float) -> bool:
        """Whether a file is held out: as its bytes or pixels were before, else as its person is, else by keyed hash."""
        known = [self.records[record] for record in pair if record in self.records]
        name = pair[0] if person is None else _record(key, person.encode())
        place = any(known) if known else self.persons.get(name, _chance(key, name) < ratio)
        if person is not None:
            self.persons.setdefault(name, place)
        self.records.update(dict.fromkeys(pair, place))
        return place


def _persons_of(source: ImageSource, images: ImageCache, identities: Path | None) -> list[str] | None:
    persons = read_identities(identities, source.names) if identities else source.persons
    if persons is None:
        return None
    by_name = dict(zip(source.names, persons, strict=True))
    return [by_name[name] for name in images.names]


def _first_of_each(records: list[tuple[str, str]]) -> Ids:
    """Rows without those whose file or whose pixels came before."""
    seen: set[str] = set()
    keep = []
    for row, pair in enumerate(records):
        if seen.isdisjoint(pair):
            keep.append(row)
        seen.update(pair)
    return np.array(keep, np.int64)


def _sharing(home: Home, others: set[str], records: set[str]) -> Iterator[str]:
    """Data sets with a record in common; one whose records are lost counts as such, for nothing proves otherwise."""
    for other in others:
        path = home.datasets / other / "split.json"
        if not path.exists() or not records.isdisjoint(_Split.load(path).records):
            yield other


def _record(key: bytes, data: bytes) -> str:
    return hmac.new(key, data, hashlib.sha256).hexdigest()


def _chance(key: bytes, name: str) -> float:
    return int.from_bytes(hmac.new(key, f"held out:{name}".encode(), hashlib.sha256).digest()[:8], "big") / 2**64
