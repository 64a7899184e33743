"""What one scan has made, in a folder of its own: pixels, split and index, and the one pointer that puts it in use.

A generation is built under the name `building`, named after the digest of all that it says, and never changed again.
`current` points to it last, when the ledger and the machine's registry know it: whatever kills a scan, what is in use
is one whole generation, or nothing is.
"""

import hashlib
import hmac
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from client.data.held_out import Split
from client.home import Home
from client.private_files import private_files, write_private
from client.records.data_key import key_id
from client.settings import SiteConfig
from shared.data.decoding import OnProgress
from shared.data.image_cache import BuildOptions, build_cache
from shared.data.image_set import CACHE_FILE, IMAGES_FILE, INDEX_FILE, ImageCache, open_cache
from shared.data.images import ImageSource
from shared.data.pixels import DECODING_VERSION
from shared.errors import InputError
from shared.storage.files import TEMPORARY_PREFIX, canonical_json, file_digest, remove_folder, sync_file

SCHEMA_VERSION = 2
NAME_LENGTH = 32
IMAGES, SPLIT, FACTS, BUILDING, CURRENT = "images", "split.json", "index.json", "building", "current"


class NotScannedError(InputError):
    """There is no data set of the size that is asked for, or what a scan wrote is damaged: scan (again)."""


class Pointer(NamedTuple):
    """The data set in use and the fingerprint of its generation; without one from an earlier version."""

    dataset_id: str
    fingerprint: str


@dataclass(frozen=True)
class Index:
    """All that a generation says; its fingerprint is an HMAC of these bytes."""

    dataset_id: str
    key_id: str
    mapping: str
    """Digest of which file shows which person; empty without persons."""
    size: int
    train: list[int]
    twins: list[int]
    held_out: list[int]
    persons: list[int] | None
    """Person of each row, numbered from 0."""
    split_sha256: str
    cache_sha256: str
    """Of the facts and of the index of the image cache."""

    def dump(self) -> bytes:
        """The bytes of its file."""
        return canonical_json({"schema": SCHEMA_VERSION, **asdict(self)})

    def fingerprint(self, key: bytes) -> str:
        """Name of the generation, under the site's key."""
        return hmac.new(key, self.dump(), hashlib.sha256).hexdigest()


def read_pointer(home: Home) -> Pointer | None:
    """What is in use; None before the first scan.

    Raises:
        NotScannedError: the pointer is damaged.
    """
    path = home.datasets / CURRENT
    if not path.exists():
        return None
    dataset_id, _, fingerprint = path.read_text(encoding="ascii", errors="replace").strip().partition("/")
    if not all(set(each) <= set("0123456789abcdef") for each in (dataset_id, fingerprint)) or not dataset_id:
        raise NotScannedError(f"{path} is damaged: run `maskfed-client data scan`")
    return Pointer(dataset_id, fingerprint)


def write_pointer(home: Home, pointer: Pointer) -> None:
    """Put a generation in use: the last step of a scan."""
    write_private(home.datasets / CURRENT, "/".join(pointer).encode())


def folder_of(home: Home, pointer: Pointer) -> Path:
    """Where a generation lies; of an earlier version, the folder of its data set."""
    folder = home.datasets / pointer.dataset_id
    return folder / pointer.fingerprint[:NAME_LENGTH] if pointer.fingerprint else folder


def build_images(
    home: Home,
    settings: SiteConfig,
    source: ImageSource,
    on_progress: OnProgress | None,
    *,
    allow_unreadable: bool = False,
    retry_unreadable: bool = False,
) -> ImageCache:
    """Decode into `building`; a build that was interrupted goes on, pixels that are current are taken as they are.

    Raises:
        InputError: no image that decodes, or too many that do not.
    """
    for left_over in home.datasets.glob(f"{TEMPORARY_PREFIX}*"):
        shutil.rmtree(left_over, ignore_errors=True)
    folder = home.datasets / BUILDING
    images = folder / IMAGES
    if (images / CACHE_FILE).exists():
        # Complete, so it may share its file with a generation in use: nothing is ever written into it again.
        if _is_current(images, settings, source, retry_unreadable=retry_unreadable):
            return open_cache(images, check_source=False)
        remove_folder(folder)
    pointer = _readable_pointer(home)
    if pointer and _is_current(
        old := folder_of(home, pointer) / IMAGES, settings, source, retry_unreadable=retry_unreadable
    ):
        remove_folder(folder)
        images.mkdir(parents=True)
        # The facts first: they mark the folder as complete, or as not to be built in.
        for name in (CACHE_FILE, INDEX_FILE, IMAGES_FILE):
            os.link(old / name, images / name)
        return open_cache(images, check_source=False)
    options = BuildOptions(allow_unreadable=allow_unreadable, retry_unreadable=retry_unreadable, is_owner=True)
    return build_cache(source.path, images, settings.image_size, options=options, on_progress=on_progress)


def finish(home: Home, index: Index, split: Split, key: bytes) -> Pointer:
    """Write split and index beside the images and give the generation its name; it is not in use yet."""
    building = home.datasets / BUILDING
    with private_files():
        write_private(building / SPLIT, split.dump())
        write_private(building / FACTS, index.dump())
        pointer = Pointer(index.dataset_id, index.fingerprint(key))
        target = folder_of(home, pointer)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not _is_whole(target, index):
            remove_folder(target)
            building.rename(target)
            sync_file(target.parent)
        sync_file(home.datasets)
    remove_folder(building)
    return pointer


def remove_others(home: Home, pointer: Pointer) -> None:
    """Delete the earlier generations of a data set: all that later scans need of them is in the split of this one."""
    keep = folder_of(home, pointer)
    for path in keep.parent.iterdir():
        if path.is_dir() and path != keep:
            remove_folder(path)
        elif path != keep:
            path.unlink()


def load_index(folder: Path) -> Index:
    """The index of a generation.

    Raises:
        NotScannedError: missing, damaged or of another version.
    """
    path = folder / FACTS
    try:
        tree: dict[str, Any] = json.loads(path.read_bytes())
        if (schema := tree.pop("schema", None)) != SCHEMA_VERSION:
            raise NotScannedError(f"{path} has schema {schema}: run `maskfed-client data scan`")
        return Index(**tree)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise NotScannedError(f"{path} is missing or damaged: run `maskfed-client data scan`") from error


def split_of(home: Home, pointer: Pointer) -> Split | None:
    """What a data set has ever seen; None where that is lost or damaged."""
    try:
        return Split.load(folder_of(home, pointer) / SPLIT)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def cache_digest(images: Path) -> str:
    """Digest of what an image cache says of itself."""
    both = file_digest(images / CACHE_FILE) + file_digest(images / INDEX_FILE)
    return hashlib.sha256(both.encode()).hexdigest()


def check_index(folder: Path, index: Index, pointer: Pointer, key: bytes) -> None:
    """Whether split, images and key are those that the index was made with, and the index the one pointed to.

    Raises:
        InputError: the key is another one.
        NotScannedError: something else does not belong together.
    """
    if index.key_id != key_id(key):
        raise InputError(
            f"data.key is {key_id(key)}, the images were scanned under {index.key_id}: put the right key back"
        )
    if index.fingerprint(key) != pointer.fingerprint or index.dataset_id != pointer.dataset_id:
        raise NotScannedError(f"{folder} is not the generation in use: run `maskfed-client data scan`")
    try:
        is_whole = _digests(folder) == (index.split_sha256, index.cache_sha256)
    except OSError:
        is_whole = False
    if not is_whole:
        raise NotScannedError(f"{folder} holds files of another scan: run `maskfed-client data scan`")


def _digests(folder: Path) -> tuple[str, str]:
    return file_digest(folder / SPLIT), cache_digest(folder / IMAGES)


def _is_whole(folder: Path, index: Index) -> bool:
    try:
        open_cache(folder / IMAGES, check_source=False)
        return load_index(folder) == index and _digests(folder) == (index.split_sha256, index.cache_sha256)
    except (InputError, OSError):
        return False


def _readable_pointer(home: Home) -> Pointer | None:
    try:
        return read_pointer(home)
    except NotScannedError:
        return None


def _is_current(images: Path, settings: SiteConfig, source: ImageSource, *, retry_unreadable: bool) -> bool:
    """Whether a complete cache was made of exactly these files at this size."""
    try:
        cache = open_cache(images, check_source=False)
        facts = json.loads((images / CACHE_FILE).read_bytes())
    except (InputError, OSError, ValueError):
        return False
    if retry_unreadable and cache.num_unreadable:
        return False
    wanted = (DECODING_VERSION, str(source.path.resolve()), source.fingerprint, "", settings.image_size, 0)
    named = ("decoding", "source", "fingerprint", "identities", "size", "crop")
    return tuple(facts.get(each) for each in named) == wanted
