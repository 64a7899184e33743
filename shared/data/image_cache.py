"""Decoded images in one memory-mapped file: decoding happens once, training reads a batch with one gather.

A cache folder holds `images.u8` (uint8, N x 3 x S x S, row after row), `index.json` (names, persons) and `cache.json`,
which is written last and makes the cache complete. An interrupted build goes on where it was. No torch at import.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shared.data.decoding import (
    DECODED,
    PENDING,
    UNREADABLE,
    DecodeJob,
    OnProgress,
    check_readable,
    close_gaps,
    decode_files,
    make_rows,
)
from shared.data.identity_file import read_identities
from shared.data.image_set import (
    CACHE_FILE,
    IMAGES_FILE,
    INDEX_FILE,
    SCHEMA_VERSION,
    SYNTHETIC_PREFIX,
    ImageCache,
    open_cache,
    read_facts,
    synthetic_images,
)
from shared.data.images import list_images
from shared.data.pixels import DECODING_VERSION
from shared.errors import InputError
from shared.paths import given_path, path_variable, user_folder
from shared.storage.files import file_digest, locked, write_atomically

PLAN_FILE, STATE_FILE = "building.json", "state.u8"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuildOptions:
    """What else a build is told."""

    identities: Path | None = None
    """Text file with a `<file name> <identity>` line for each image; without it class folders are persons."""
    crop: int = 0
    """Side of the centre crop in source pixels, 0: the short side."""
    allow_unreadable: bool = False
    """Whether more than `decoding.MAX_UNREADABLE` of the files may be left out."""
    retry_unreadable: bool = False
    """Decode again when an earlier build left files out."""
    is_owner: bool = False
    """Whether the caller owns the folder and may replace a cache of another source in it."""


@dataclass(frozen=True)
class _Plan:
    """What a build makes; a half-made build goes on only when this is unchanged."""

    schema: int
    decoding: int
    source: str
    fingerprint: str
    identities: str
    size: int
    crop: int


def build_cache(
    source: Path,
    cache_dir: Path,
    size: int,
    workers: int | None = None,
    options: BuildOptions | None = None,
    *,
    on_progress: OnProgress | None = None,
) -> ImageCache:
    """Decode a folder or zip into `cache_dir`; nothing to do when that is there and still good.

    Unreadable files are skipped, counted in the cache and named in the log of this process only.

    Args:
        source: folder or zip of images.
        cache_dir: folder of the cache; new, empty, or a cache of the same source.
        size: side in pixels.
        workers: processes; default: the cores this process may use.
        options: see `BuildOptions`.
        on_progress: told images done and in all.

    Raises:
        InputError: bad source, identities or folder, a folder of another source, a file that the machine could not
            read, no image that decodes, or too few of them.
    """
    options, found = options or BuildOptions(), list_images(source)
    persons = read_identities(options.identities, found.names) if options.identities else found.persons
    digest = file_digest(options.identities) if options.identities else ""
    resolved = str(source.resolve())
    plan = _Plan(SCHEMA_VERSION, DECODING_VERSION, resolved, found.fingerprint, digest, size, options.crop)
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cache folder {cache_dir}: {error.strerror}; name another (--out, MASKFED_CACHE)") from error
    with locked(cache_dir / ".lock"), _nothing_half_made(cache_dir):
        if not _is_current(cache_dir, plan, options):
            state = _prepare(cache_dir, plan, len(found.names), options)
            files = str(cache_dir / IMAGES_FILE), str(cache_dir / STATE_FILE)
            job = DecodeJob(plan.source, plan.fingerprint, size, plan.crop, *files)
            decode_files(job, found, state, workers or len(os.sched_getaffinity(0)), on_progress)
            if not (state == DECODED).any():
                (cache_dir / STATE_FILE).unlink(missing_ok=True)
            check_readable(job, state, allow_unreadable=options.allow_unreadable)
            _finish(cache_dir, plan, found.names, persons, state, found.ignored)
        return open_cache(cache_dir, check_source=False)


@contextmanager
def _nothing_half_made(cache_dir: Path) -> Iterator[None]:
    """After a failure a build that can go on stays, and a cache; of anything less nothing stays, nor the folder."""
    before = {path.name for path in cache_dir.iterdir()} - {".lock"}
    try:
        yield
    except BaseException:
        if not any((cache_dir / name).exists() for name in (CACHE_FILE, STATE_FILE)):
            for name in {PLAN_FILE, IMAGES_FILE, INDEX_FILE, ".lock"} - before:
                (cache_dir / name).unlink(missing_ok=True)
            with suppress(OSError):
                cache_dir.rmdir()
        raise


def _is_current(cache_dir: Path, plan: _Plan, options: BuildOptions) -> bool:
    path = cache_dir / CACHE_FILE
    if not path.exists():
        return False
    facts = read_facts(cache_dir, CACHE_FILE)
    if any(facts.get(key) != value for key, value in asdict(plan).items()):
        return False
    try:
        cache = open_cache(cache_dir, check_source=False)
    except InputError as error:
        log.warning("decoding again: %s", error)
        return False
    return not (options.retry_unreadable and cache.num_unreadable)


def _prepare(cache_dir: Path, plan: _Plan, num_files: int, options: BuildOptions) -> NDArray[np.uint8]:
    """State of each file so far; all pending unless a build of the same plan was interrupted."""
    _check_owner(cache_dir, plan, options)
    row_bytes = 3 * plan.size * plan.size
    plan_path, state_path, images_path = (cache_dir / name for name in (PLAN_FILE, STATE_FILE, IMAGES_FILE))
    if state_path.exists() and plan_path.exists() and read_facts(cache_dir, PLAN_FILE) == asdict(plan):
        state = np.fromfile(state_path, np.uint8)
        if len(state) == num_files and images_path.stat().st_size == num_files * row_bytes:
            state[state == UNREADABLE] = PENDING if options.retry_unreadable else UNREADABLE
            return state
    for name in (CACHE_FILE, STATE_FILE, INDEX_FILE):
        (cache_dir / name).unlink(missing_ok=True)
    write_atomically(plan_path, json.dumps(asdict(plan)))
    make_rows(images_path, num_files, row_bytes)
    return np.full(num_files, PENDING, np.uint8)


def _check_owner(cache_dir: Path, plan: _Plan, options: BuildOptions) -> None:
    """Refuse a folder that holds something else.

    Raises:
        InputError: other files, or a cache of another source, finished or not.
    """
    is_cache = any((cache_dir / name).exists() for name in (CACHE_FILE, PLAN_FILE))
    ours = {PLAN_FILE, STATE_FILE, IMAGES_FILE, INDEX_FILE, CACHE_FILE} if is_cache else set()
    if strangers := [path.name for path in cache_dir.iterdir() if path.name not in ours and path.name[0] != "."]:
        raise InputError(f"cache folder {cache_dir} holds other files ({sorted(strangers)[0]!r}): name a new folder")
    for name in (CACHE_FILE, PLAN_FILE):
        if options.is_owner or not (cache_dir / name).exists():
            continue
        if (owner := read_facts(cache_dir, name).get("source")) != plan.source:
            raise InputError(
                f"cache folder {cache_dir} is of {owner}, not of {plan.source}: name another (--out), or delete it"
            )


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
    path = Path(given_path(path) if isinstance(path, str) else path)
    if (path / CACHE_FILE).exists():
        cache = open_cache(path)
        if cache.size != size:
            raise InputError(
                f"image cache {path} holds {cache.size} x {cache.size} pixels, the experiment asks for {size}: "
                f"make one with `maskfed-server data cache DIR --size {size}`"
            )
        return cache
    key = hashlib.sha256(os.fsencode(f"{path.resolve()}|{size}")).hexdigest()[:16]
    home = cache_home or default_cache_home()
    return build_cache(path, home / f"{path.stem[:50]}-{size}-{key}", size, on_progress=on_progress)


def default_cache_home() -> Path:
    """`MASKFED_CACHE`, else `maskfed` below `XDG_CACHE_HOME` or `~/.cache`."""
    named = path_variable("MASKFED_CACHE")
    return Path(named) if named else user_folder("XDG_CACHE_HOME", ".cache") / "maskfed"


def _finish(
    cache_dir: Path,
    plan: _Plan,
    names: tuple[str, ...],
    persons: tuple[str, ...] | None,
    state: NDArray[np.uint8],
    ignored: Mapping[str, int],
) -> None:
    good, codes = np.flatnonzero(state == DECODED), None
    # From here the rows move: without its state an interrupted build starts over.
    (cache_dir / STATE_FILE).unlink()
    close_gaps(cache_dir / IMAGES_FILE, good, 3 * plan.size * plan.size)
    if persons is not None:
        codes = np.unique(np.asarray(persons)[good], return_inverse=True)[1].tolist()
    index = {"names": [names[row] for row in good], "persons": codes}
    write_atomically(cache_dir / INDEX_FILE, json.dumps(index))
    counts = {"num_images": len(good), "num_unreadable": len(names) - len(good), "ignored": dict(ignored)}
    facts = {**asdict(plan), **counts, "content": file_digest(cache_dir / IMAGES_FILE)}
    write_atomically(cache_dir / CACHE_FILE, json.dumps(facts, indent=2) + "\n")
    (cache_dir / PLAN_FILE).unlink()
