"""Long jobs in parts: each part is a file of its own, so that ranks share the work and a restart goes on where it was.

Part k holds the same items whatever the number of ranks, and is written whole or not at all. Several machines need a
folder that all of them see.
"""

import io
import json
import os
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.errors import InputError
from shared.storage.files import locked, write_atomically

CHUNK_ITEMS = 256
JOB_FILE, LOCK_FILE = "job.json", ".writer.lock"
_TORCHRUN = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Rank:
    """One process of a job."""

    index: int = 0
    count: int = 1
    local_index: int = 0
    """Index on its machine, which picks the GPU."""

    @property
    def is_first(self) -> bool:
        """Whether this process puts the parts together."""
        return self.index == 0


def rank_from_environment() -> Rank:
    """The process' place as torchrun tells it; alone without torchrun.

    Raises:
        InputError: variables of the environment that no torchrun sets.
    """
    index, count, local = (whole_number(name, default) for name, default in _TORCHRUN.items())
    if index >= max(1, count):
        raise InputError(f"RANK is {index}, WORLD_SIZE {count}: unset both, or start the command by torchrun")
    return Rank(index, max(1, count), local)


def whole_number(variable: str, default: int) -> int:
    """A number of the environment; `default` where it is not set.

    Raises:
        InputError: something else than a whole number from 0.
    """
    value = os.environ.get(variable, "").strip() or str(default)
    if not (value.isascii() and value.isdecimal() and len(value) <= 9):  # no machine counts further
        raise InputError(f"{variable} is {value[:40]!r} in the environment: a whole number from 0, or unset it")
    return int(value)


@contextmanager
def open_job(folder: Path, facts: Mapping[str, object], num_items: int, rank: Rank) -> Iterator["ChunkedJob"]:
    """A job whose parts no other command makes or deletes at the same time; nothing of it stays where it made no part.

    Ranks of one torchrun are one command: the first holds the folder for all.

    Raises:
        InputError: another command works there, who is named; or the folder holds something else.
    """
    _refuse_foreign(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = locked(folder / LOCK_FILE, f"{folder} is being written by") if rank.is_first else nullcontext()
    with lock:
        try:
            yield ChunkedJob(folder, facts, num_items, rank)
        finally:
            if rank.is_first and folder.exists() and not any(folder.glob("part-*")):
                shutil.rmtree(folder, ignore_errors=True)


def _refuse_foreign(folder: Path) -> None:
    """The parts are deleted with their folder at the end: it must be ours.

    Raises:
        InputError: the folder holds files of somebody else.
    """
    if folder.is_dir() and not (folder / JOB_FILE).exists():
        others = sorted(each.name for each in folder.iterdir() if each.name != LOCK_FILE)
        if others:
            raise InputError(f"{folder} holds other files ({others[0][:80]!r}): name another place")


class ChunkedJob:
    """Items 0..N-1 of one job, in parts of `CHUNK_ITEMS`, below one folder.

    Args:
        folder: made if it does not exist.
        facts: everything that decides the content; parts of a job with other facts are refused.
        num_items: N.
        rank: which process this is.
    """

    def __init__(self, folder: Path, facts: Mapping[str, object], num_items: int, rank: Rank) -> None:
        self.folder, self.num_items, self.rank = folder, num_items, rank
        folder.mkdir(parents=True, exist_ok=True)
        wanted = json.loads(json.dumps({**facts, "num_items": num_items, "chunk_items": CHUNK_ITEMS}, default=str))
        path = folder / JOB_FILE
        if path.exists():
            _check_same(folder, _read(path), wanted)
        else:
            write_atomically(path, json.dumps(wanted, indent=2) + "\n")

    @property
    def num_chunks(self) -> int:
        """Number of parts."""
        return -(-self.num_items // CHUNK_ITEMS)

    def range_of(self, chunk: int) -> range:
        """Items of a part."""
        return range(chunk * CHUNK_ITEMS, min(self.num_items, (chunk + 1) * CHUNK_ITEMS))

    def run(self, make: Callable[[range], Arrays], on_items: Callable[[int], None] | None = None) -> None:
        """Make the parts of this rank that are not there yet.

        Args:
            make: arrays of the given items.
            on_items: told the number of items of each part that was found done already.
        """
        for chunk in range(self.rank.index, self.num_chunks, self.rank.count):
            items = self.range_of(chunk)
            if self._is_done(chunk):
                if on_items is not None:
                    on_items(len(items))
                continue
            buffer = io.BytesIO()
            np.savez(buffer, allow_pickle=False, **make(items))
            write_atomically(self._path(chunk), buffer.getvalue())

    def wait(self, deadline_seconds: float) -> None:
        """Wait until the parts of all ranks are there.

        Raises:
            InputError: some are missing at the deadline.
        """
        deadline = time.monotonic() + deadline_seconds
        while missing := [chunk for chunk in range(self.num_chunks) if not self._path(chunk).exists()]:
            if time.monotonic() > deadline:
                raise InputError(
                    f"{self.folder}: {len(missing)} of {self.num_chunks} parts are missing after "
                    f"{deadline_seconds:g} s: run the same command again to continue"
                )
            time.sleep(0.2)

    def parts(self) -> Iterator[Arrays]:
        """The parts in order, one in memory at a time."""
        for chunk in range(self.num_chunks):
            with np.load(self._path(chunk), allow_pickle=False) as part:
                yield {name: part[name] for name in part.files}

    def remove(self) -> None:
        """Delete the parts."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, chunk: int) -> Path:
        return self.folder / f"part-{chunk:06d}.npz"

    def _is_done(self, chunk: int) -> bool:
        return self._path(chunk).exists() and zipfile.is_zipfile(self._path(chunk))


def _read(path: Path) -> dict[str, object]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise InputError(f"{path} is damaged: delete the folder {path.parent}")
    return found


def _check_same(folder: Path, found: dict[str, object], wanted: dict[str, object]) -> None:
    """Refuse to mix two jobs.

    Raises:
        InputError: naming the first fact that differs.
    """
    for key in sorted({*found, *wanted}):
        if found.get(key) != wanted.get(key):
            raise InputError(
                f"{folder} holds parts of another job ({key} is {found.get(key)!r}, not {wanted.get(key)!r}): "
                "delete it or name another place"
            )
