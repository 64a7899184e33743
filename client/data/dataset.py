"""The site's images: decoded once into a private file, duplicates dropped, a share of the persons set aside.

A data set has a random id that stays when images are added, so that they inherit all spending. What is kept of each
file are HMACs under the site's key, and under the machine's key in the registry: they tell a later scan, or another
home, what has been seen, and nothing to anybody else. What cannot be compared counts as the same data. No torch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.data.generations import (
    IMAGES,
    NotScannedError,
    Pointer,
    build_images,
    check_index,
    folder_of,
    load_index,
    read_pointer,
)
from client.data.scan import Scanner
from client.data.scan_report import CURE_PERSONS, Scan
from client.home import Home
from client.private_files import private_files
from client.records.data_key import read_data_key
from client.records.data_registry import DataRegistry, existing_registry, registry_folder
from client.records.ledger import open_ledger, read_ledger
from client.records.ledger_history import History
from client.settings import SiteConfig, Unit
from shared.data.image_set import ImageCache, open_cache
from shared.errors import InputError

__all__ = ["CURE_PERSONS", "Dataset", "NotScannedError", "Scan", "current_id", "open_dataset", "scan"]

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Dataset:
    """A scanned data set at one image size. Rows are numbers of images in `images`."""

    dataset_id: str
    fingerprint: str
    """Names the generation; a charge on any other is refused by the ledger."""
    size: int
    train: Ids
    """Each picture once."""
    twins: Ids
    """Pictures of `train` that are filed under further persons."""
    held_out: Ids
    persons: Ids | None
    """Person of each row, or None where images are not sorted by person."""
    images: ImageCache

    def units(self, unit: Unit) -> list[Ids]:
        """Training rows of each unit of privacy: one picture each, or all pictures of one person.

        Raises:
            InputError: persons are asked for and not known.
        """
        if unit == "image":
            return list(self.train.reshape(-1, 1))
        if self.persons is None:
            raise InputError(f"the images are not sorted by person. {CURE_PERSONS}")
        rows = np.sort(np.concatenate([self.train, self.twins]))
        rows = rows[np.argsort(self.persons[rows], kind="stable")]
        borders = np.flatnonzero(np.diff(self.persons[rows])) + 1
        return [group for group in np.split(rows, borders) if len(group)]


def scan(
    home: Home,
    settings: SiteConfig,
    *,
    is_new: bool = False,
    is_key_lost: bool = False,
    allow_unreadable: bool = False,
    retry_unreadable: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Scan:
    """Index the folder of `site.toml`; safe to interrupt and to repeat. No round can start meanwhile.

    Args:
        home: the site.
        settings: names folder, size and held-out share.
        is_new: begin another data set instead of going on with the current one.
        is_key_lost: draw another key in place of one that is lost for good; the data set is another one, too.
        allow_unreadable: leave out more than 1 percent of the files.
        retry_unreadable: decode again where files were left out.
        on_progress: told files done and in all.

    Raises:
        InputError: no usable images, none left to train on, persons that are not clear, or another key than before.
        BusyError: a round or another scan is running.
    """
    DataRegistry(registry_folder()).prepare()
    with private_files(), open_ledger(home.ledger, Path(settings.head_file)) as ledger:
        scanner = Scanner(home, settings, ledger, is_new=is_new, is_key_lost=is_key_lost)
        images = build_images(
            home,
            settings,
            scanner.source,
            on_progress,
            allow_unreadable=allow_unreadable,
            retry_unreadable=retry_unreadable,
        )
        return scanner.run(images)


def current_id(home: Home) -> str | None:
    """Id of the data set in use; None before the first scan."""
    pointer = read_pointer(home)
    return pointer.dataset_id if pointer else None


def open_dataset(home: Home, size: int) -> Dataset:
    """The current data set at `size` pixels, if index, split, pixels, key, ledger and registry all name it.

    Raises:
        NotScannedError: not scanned at this size, or not the generation that the last scan has made.
        InputError: data.key is missing or another one.
    """
    pointer = read_pointer(home)
    if pointer is None:
        raise NotScannedError(f"no images of {size} pixels are scanned: run `maskfed-client data scan`")
    if not pointer.fingerprint:
        raise NotScannedError("the images were scanned by an earlier version: run `maskfed-client data scan`")
    folder = folder_of(home, pointer)
    index = load_index(folder)
    if index.size != size:
        raise NotScannedError(
            f"no images of {size} pixels are scanned, those in use have {index.size}: run `maskfed-client data scan`"
        )
    check_index(folder, index, pointer, read_data_key(home))
    _check_known(read_ledger(home.ledger), pointer)
    try:
        images = open_cache(folder / IMAGES, check_source=False)
    except InputError as error:
        raise NotScannedError(f"the images in {folder} are not complete: run `maskfed-client data scan`") from error
    return Dataset(
        dataset_id=index.dataset_id,
        fingerprint=pointer.fingerprint,
        size=size,
        train=np.array(index.train, np.int64),
        twins=np.array(index.twins, np.int64),
        held_out=np.array(index.held_out, np.int64),
        persons=None if index.persons is None else np.array(index.persons, np.int64),
        images=images,
    )


def _check_known(history: History, pointer: Pointer) -> None:
    """Whether ledger and registry know this generation as the newest of its data set."""
    facts = history.registration(pointer.dataset_id)
    if facts is None or facts["fingerprint"] != pointer.fingerprint:
        raise NotScannedError("the ledger does not name the images in use: run `maskfed-client data scan`")
    registry = existing_registry()
    if registry is None or not registry.knows(pointer.dataset_id, pointer.fingerprint, str(facts["machine_key_id"])):
        raise NotScannedError(
            "the registry of this machine does not know the images in use: run `maskfed-client data scan`"
        )
