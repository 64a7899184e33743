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

from client.data.held_out import Split, first_of_each, record_of
from client.records.ledger import open_ledger
from client.settings import Home, SiteConfig, SitePolicy, Unit, private_files, read_data_key, write_private
from shared.data.identity_file import read_identities
from shared.data.image_cache import BuildOptions, build_cache
from shared.data.image_set import ImageCache, open_cache
from shared.data.images import ImageSource, ignored_text, list_images
from shared.data.pixels import shorter_side
from shared.errors import InputError

SCHEMA_VERSION = 1
CURE_PERSONS = "Give one folder per person and no image beside the folders, or `identities`, and scan again."
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
            raise InputError(f"the images are not sorted by person. {CURE_PERSONS}")
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
    ignored: dict[str, int]
    """Files that are no images, by suffix."""
    shorter_sides: tuple[int, int, int]
    """Of the files as they are, in pixels: smallest, median, largest."""
    num_enlarged: int
    """Files smaller than the size of the data set."""
    linked: list[str]
    """Other data sets that share files: their spending counts here, and this one's there."""

    def lines(self, policy: SitePolicy) -> Iterator[str]:
        """For the operator: counts, persons, sizes, and what keeps the site from training."""
        yield f"data set {self.dataset_id}: {self.num_train} images to train on at {self.size} x {self.size} pixels"
        known = "" if self.num_persons is None else f" ({self.num_held_out_persons} of {self.num_persons} persons)"
        yield f"held out for audits, never trained on: {self.num_held_out}{known}"
        yield "shorter side of the files: {} to {} pixels, median {}".format(
            *self.shorter_sides[::2], self.shorter_sides[1]
        )
        named = ", named in logs/scan.log" if self.num_unreadable else ""
        yield f"dropped: {self.num_duplicates} duplicates, {self.num_unreadable} unreadable{named}"
        if self.ignored:
            yield f"no images by their suffix: {ignored_text(self.ignored)}"
        if self.linked:
            yield f"shares files with {', '.join(self.linked)}: spending counts for all of them"
        if self.num_enlarged:
            yield f"PROBLEM: {self.num_enlarged} files are smaller than {self.size} pixels and were enlarged"
        if self.num_train < policy.min_images_train:
            yield f"PROBLEM: training is refused below policy.min_images_train, which is {policy.min_images_train}"
        if policy.unit == "person" and self.num_persons is None:
            yield f"PROBLEM: policy.unit is 'person': training with DP is refused. {CURE_PERSONS}"


def scan(
    home: Home,
    settings: SiteConfig,
    *,
    is_new: bool = False,
    allow_unreadable: bool = False,
    retry_unreadable: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Scan:
    """Index the folder of `site.toml`; safe to interrupt and to repeat. No round can start meanwhile.

    Args:
        home: the site.
        settings: names folder, size and held-out share.
        is_new: begin another data set instead of going on with the current one.
        allow_unreadable: leave out more than 1 percent of the files.
        retry_unreadable: decode again where files were left out.
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
            options=BuildOptions(
                identities, allow_unreadable=allow_unreadable, retry_unreadable=retry_unreadable, is_owner=True
            ),
            on_progress=on_progress,
        )
        key = read_data_key(home)
        persons = _persons_of(source, images, identities)
        records, sides = [], []
        for name, pixels in zip(images.names, images.images, strict=True):
            data = source.read(name)
            records.append((record_of(key, data), record_of(key, pixels.tobytes())))
            sides.append(shorter_side(data))
        keep = first_of_each(records)
        split = Split.load(folder / "split.json")
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
        ignored=images.ignored,
        shorter_sides=(min(sides), sorted(sides)[len(sides) // 2], max(sides)),
        num_enlarged=sum(side < settings.image_size for side in sides),
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
        raise NotScannedError(
            f"the images of {size} pixels in {path.parent} are not complete: run `maskfed-client data scan`"
        ) from error
    return Dataset(
        dataset_id=dataset_id,
        fingerprint=index["fingerprint"],
        size=size,
        train=np.array(index["train"], np.int64),
        held_out=np.array(index["held_out"], np.int64),
        persons=images.persons,
        images=images,
    )


def _persons_of(source: ImageSource, images: ImageCache, identities: Path | None) -> list[str] | None:
    persons = read_identities(identities, source.names) if identities else source.persons
    if persons is None:
        return None
    by_name = dict(zip(source.names, persons, strict=True))
    return [by_name[name] for name in images.names]


def _sharing(home: Home, others: set[str], records: set[str]) -> Iterator[str]:
    """Data sets with a record in common; one whose records are lost counts as such, for nothing proves otherwise."""
    for other in others:
        path = home.datasets / other / "split.json"
        if not path.exists() or not records.isdisjoint(Split.load(path).records):
            yield other
