"""Files that only the site's own user may read: written in one step, refused where others can look into them.

A command meets a full disk with one line. The process that answers the coordinator waits for room instead: what it has
trained is charged, and would be lost.
"""

import fcntl
import logging
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TypeVar

from shared.errors import InputError
from shared.storage.files import write_atomically
from shared.storage.room import SPARE_BYTES, patiently

PATIENCE_SECONDS = 3600.0
"""How long an answer waits for room on the disk; then it is a refusal (`disk_full`)."""
_patience: ContextVar[float] = ContextVar("patience", default=0.0)
T = TypeVar("T")
log = logging.getLogger("maskfed.client")


def check_private(path: Path) -> None:
    """Refuse a private file that others can read or change.

    Raises:
        InputError: it is missing, or its mode has any bit for group or others.
    """
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; run `maskfed-client join` first") from error
    if mode & 0o077:
        raise InputError(f"{path} has mode {mode:04o}, at most 0600 is safe: chmod 600 {path}")


@contextmanager
def private_files() -> Iterator[None]:
    """Let every file and folder that is made in the block be readable by this user alone, also by child processes."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


@contextmanager
def patient_writes(seconds: float = PATIENCE_SECONDS) -> Iterator[None]:
    """Let what is written in the block wait so long for room on a full disk."""
    token = _patience.set(seconds)
    try:
        yield
    finally:
        _patience.reset(token)


def with_room(write: Callable[[], T], folder: Path, num_bytes: int) -> T:
    """Do `write`, which leaves nothing half-written; again when there is room, where the caller is patient.

    Raises:
        OSError: whatever it raises, a full disk only after the patience is over.
    """
    return patiently(write, folder, num_bytes + SPARE_BYTES, log.warning, most_seconds=_patience.get())


def write_private(path: Path, data: bytes, tail: bytes | memoryview = b"") -> None:
    """Write `path` (0600) so that a reader, or a crash, sees the old content or the new; `tail` is not copied."""
    with private_files():
        path.parent.mkdir(parents=True, exist_ok=True)
        size = len(data) + memoryview(tail).nbytes
        with_room(lambda: write_atomically(path, data, 0o600, tail=tail), path.parent, size)


@contextmanager
def one_at_a_time(file: Path) -> Iterator[None]:
    """Hold what is remembered in `file`, by a lock beside it that needs no room on the disk: others wait meanwhile."""
    with private_files():
        file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
