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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.errors import InputError
from shared.storage.files import write_atomically

CHUNK_ITEMS = 256
JOB_FILE = "job.json"
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
    """The process' place as torchrun tells it; alone without torchrun."""
    index, count, local = (int(os.environ.get(name, "") or default) for name, default in _TORCHRUN.items())
    return Rank(index, count, local)


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
            _check_same(folder, json.loads(path.read_text(encoding="utf-8")), wanted)
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
