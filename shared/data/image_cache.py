"""Decoded images in one memory-mapped file: decoding happens once, training reads a batch with one gather.

A cache folder holds `images.u8` (uint8, N x 3 x S x S, row after row), `index.json` (names, persons) and `cache.json`,
which is written last and makes the cache complete. An interrupted build goes on where it was. No torch at import.
"""

import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.data.decoding import DECODED, PENDING, DecodeJob, OnProgress, decode_files
from shared.data.image_set import SYNTHETIC_PREFIX, ImageCache, synthetic_images
from shared.data.images import list_images, read_identities
from shared.errors import InputError
from shared.storage.files import file_digest, write_atomically

SCHEMA_VERSION = 1
CACHE_FILE, INDEX_FILE, IMAGES_FILE = "cache.json", "index.json", "images.u8"
PLAN_FILE, STATE_FILE = "building.json", "state.u8"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Plan:
    """What a build makes; a half-made build goes on only when this is unchanged."""

    schema: int
    source: str
    fingerprint: str
    identities: str
    size: int
    crop: int


def open_cache(folder: Path, check_source: bool = True) -> ImageCache:
    """Open a finished cache; only its index is read.

    Args:
        folder: where `build_cache` wrote it.
        check_source: also compare with the folder or zip it was made from, when that still exists (one file listing).

    Raises:
        InputError: not a cache, unfinished, truncated, of another schema, or older than its source.
    """
    facts = _read_json(folder / CACHE_FILE, folder)
    if facts.get("schema") != SCHEMA_VERSION:
        raise InputError(
            f"image cache {folder}: schema {facts.get('schema')!r}, not {SCHEMA_VERSION}; {_remedy(facts)}"
        )
    num_images, size = int(facts["num_images"]), int(facts["size"])
    path = folder / IMAGES_FILE
    expected, found = num_images * 3 * size * size, path.stat().st_size if path.exists() else 0
    if found != expected:
        raise InputError(
            f"image cache {folder}: {IMAGES_FILE} has {found} bytes where {num_images} images of {size} x {size} need "
            f"{expected}: truncated or overwritten; delete the folder and {_remedy(facts)}"
        )
    source = Path(facts["source"])
    if check_source and source.exists() and list_images(source).fingerprint != facts["fingerprint"]:
        raise InputError(f"image cache {folder} is older than its images in {source}: {_remedy(facts)}")
    index = _read_json(folder / INDEX_FILE, folder)
    persons = None if index["persons"] is None else np.asarray(index["persons"], np.int64)
    return ImageCache(
        lambda: np.memmap(path, np.uint8, "r", shape=(num_images, 3, size, size)),
        num_images,
        size,
        persons=persons,
        names=tuple(index["names"]),
        num_unreadable=int(facts["num_unreadable"]),
    )


def build_cache(
    source: Path,
    cache_dir: Path,
    size: int,
    workers: int | None = None,
    *,
    identities: Path | None = None,
    crop: int = 0,
    on_progress: OnProgress | None = None,
) -> ImageCache:
    """Decode a folder or zip into `cache_dir`; nothing to do when that is there and still good.

    Unreadable files are skipped, counted in the cache and named in the log of this process only.

    Args:
        source: folder or zip of images.
        cache_dir: folder of the cache; new, empty, or a cache of the same source.
        size: side in pixels.
        workers: processes; default: the cores this process may use.
        identities: text file with a `<file name> <identity>` line for each image; without it class folders are persons.
        crop: side of the centre crop in source pixels, 0: the short side.
        on_progress: told images done and in all.

    Raises:
        InputError: bad source, identities, folder, or no image that decodes.
    """
    found = list_images(source)
    persons = read_identities(identities, found.names) if identities else found.persons
    digest = file_digest(identities) if identities else ""
    plan = _Plan(SCHEMA_VERSION, str(source.resolve()), found.fingerprint, digest, size, crop)
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cache folder {cache_dir}: {error.strerror}; name another (--out, MASKFED_CACHE)") from error
    with _locked(cache_dir):
        if not _is_current(cache_dir, plan):
            state = _prepare(cache_dir, plan, len(found.names))
            job = DecodeJob(plan.source, size, crop, str(cache_dir / IMAGES_FILE), str(cache_dir / STATE_FILE))
            decode_files(job, found, state, workers or len(os.sched_getaffinity(0)), on_progress)
            _finish(cache_dir, plan, found.names, persons, state)
        return open_cache(cache_dir, check_source=False)


def _is_current(cache_dir: Path, plan: _Plan) -> bool:
    path = cache_dir / CACHE_FILE
    if not path.exists():
        return False
    facts = _read_json(path, cache_dir)
    if any(facts.get(key) != value for key, value in asdict(plan).items()):
        return False
    try:
        open_cache(cache_dir, check_source=False)
    except InputError as error:
        log.warning("decoding again: %s", error)
        return False
    return True


def _prepare(cache_dir: Path, plan: _Plan, num_files: int) -> NDArray[np.uint8]:
    """State of each file so far; all pending unless a build of the same plan was interrupted."""
    row_bytes = 3 * plan.size * plan.size
    plan_path, state_path, images_path = (cache_dir / name for name in (PLAN_FILE, STATE_FILE, IMAGES_FILE))
    if state_path.exists() and plan_path.exists() and json.loads(plan_path.read_text()) == asdict(plan):
        state = np.fromfile(state_path, np.uint8)
        if len(state) == num_files and images_path.stat().st_size == num_files * row_bytes:
            return state
    ours = {PLAN_FILE, STATE_FILE, IMAGES_FILE, INDEX_FILE, CACHE_FILE}
    if strangers := [path.name for path in cache_dir.iterdir() if path.name not in ours and path.name[0] != "."]:
        raise InputError(f"cache folder {cache_dir} holds other files ({sorted(strangers)[0]!r}): name a new folder")
    for name in (CACHE_FILE, STATE_FILE, INDEX_FILE):
        (cache_dir / name).unlink(missing_ok=True)
    write_atomically(plan_path, json.dumps(asdict(plan)))
    with images_path.open("wb") as file:
        file.truncate(num_files * row_bytes)
    return np.full(num_files, PENDING, np.uint8)


def open_images(
    path: Path | str, size: int, cache_home: Path | None = None, on_progress: OnProgress | None = None
) -> ImageCache:
    """Images of `size` x `size` pixels from whatever the user names.

    Args:
        path: a folder, a zip, a cache folder, or `synthetic:<site>[:<num_images>[:<seed>]]`, for example
            `synthetic:public:10000`, generated in memory.
        size: side in pixels.
        cache_home: where folders and zips are cached; default: `default_cache_home`.
        on_progress: told how far the decoding is.

    Raises:
        InputError: no images there, or a cache of another size or one that is no longer good.
    """
    if str(path).startswith(SYNTHETIC_PREFIX):
        return synthetic_images(str(path), size)
    path = Path(path)
    if (path / CACHE_FILE).exists():
        cache = open_cache(path)
        if cache.size != size:
            raise InputError(
                f"image cache {path} holds {cache.size} x {cache.size} pixels, the experiment asks for {size}: "
                f"make one with `maskfed-server data cache DIR --size {size}`"
            )
        return cache
    key = hashlib.sha256(f"{path.resolve()}|{size}".encode()).hexdigest()[:16]
    cache_dir = (cache_home or default_cache_home()) / f"{path.stem}-{size}-{key}"
    return build_cache(path, cache_dir, size, on_progress=on_progress)


def default_cache_home() -> Path:
    """`MASKFED_CACHE`, else `maskfed` below `XDG_CACHE_HOME` or `~/.cache`."""
    if named := os.environ.get("MASKFED_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "maskfed"


def _read_json(path: Path, folder: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"image cache {folder}: no readable {path.name} ({error.strerror}); a build that was interrupted goes on "
            "with the same `maskfed-server data cache` command"
        ) from error
    except ValueError as error:
        raise InputError(f"image cache {folder}: {path.name} is damaged; delete the folder and cache again") from error
    if not isinstance(tree, dict):
        raise InputError(f"image cache {folder}: {path.name} is damaged; delete the folder and cache again")
    return tree


def _remedy(facts: dict[str, Any]) -> str:
    return f"run `maskfed-server data cache {facts.get('source')} --size {facts.get('size')}` again"


def _finish(
    cache_dir: Path, plan: _Plan, names: tuple[str, ...], persons: tuple[str, ...] | None, state: NDArray[np.uint8]
) -> None:
    good = np.flatnonzero(state == DECODED)
    if not len(good):
        raise InputError(f"images {plan.source}: none of {len(names)} files decodes; give readable pictures")
    # From here the rows move: without its state an interrupted build starts over.
    (cache_dir / STATE_FILE).unlink()
    _close_gaps(cache_dir / IMAGES_FILE, good, 3 * plan.size * plan.size)
    codes = None
    if persons is not None:
        codes = np.unique(np.asarray(persons)[good], return_inverse=True)[1].tolist()
    index = {"names": [names[row] for row in good], "persons": codes}
    write_atomically(cache_dir / INDEX_FILE, json.dumps(index))
    facts = {**asdict(plan), "num_images": len(good), "num_unreadable": len(names) - len(good)}
    write_atomically(cache_dir / CACHE_FILE, json.dumps(facts, indent=2) + "\n")
    (cache_dir / PLAN_FILE).unlink()


def _close_gaps(path: Path, good: NDArray[np.int64], row_bytes: int) -> None:
    with path.open("r+b") as file:
        for target, row in enumerate(good.tolist()):
            if target != row:
                os.pwrite(file.fileno(), os.pread(file.fileno(), row_bytes, row * row_bytes), target * row_bytes)
        file.truncate(len(good) * row_bytes)
        os.fsync(file.fileno())


@contextmanager
def _locked(cache_dir: Path) -> Iterator[None]:
    with (cache_dir / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
