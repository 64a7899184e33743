"""Room on a disk: whoever meets a full one waits, says so, and goes on when there is room again."""

import errno
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
"""What a full disk, or a user's share of it, answers."""
SPARE_BYTES = 2**24
"""Beside the one large file: logs, records, heads."""
LOOK_SECONDS = 2.0
REPORT_SECONDS = 60.0
T = TypeVar("T")


def has_room(folder: Path, num_bytes: int) -> bool:
    """Whether a file of so many bytes can be written into `folder`; tried, since a quota shows nowhere else.

    Where the file system cannot say, it is taken to have room: writing then tells.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, max(1, num_bytes))
    except OSError as error:
        return error.errno not in FULL
    return True


def room_problem(folder: Path) -> str:
    """That whoever writes into `folder` has to wait, for people; empty where it does not."""
    if has_room(folder, SPARE_BYTES):
        return ""
    return f"the disk of {folder} is full: what writes there waits until {SPARE_BYTES / 2**20:.0f} MiB or more are free"


def wait_for_room(
    folder: Path,
    num_bytes: int,
    tell: Callable[[str], object],
    *,
    most_seconds: float = float("inf"),
    attend: Callable[[], object] = lambda: None,
) -> float:
    """Wait until `folder` has room for a file of so many bytes.

    Args:
        folder: on the disk that is asked.
        num_bytes: of the file.
        tell: gets one line at once and then each minute.
        most_seconds: after which the wait ends all the same.
        attend: called between two looks; what it raises ends the wait.

    Returns:
        Seconds waited; 0 where there was room.
    """
    begun, told = time.monotonic(), float("-inf")
    while not has_room(folder, num_bytes):
        waited = time.monotonic() - begun
        if waited > most_seconds:
            return waited
        if waited - told >= REPORT_SECONDS:
            told = waited
            tell(f"{folder}: the disk is full; waiting until {num_bytes / 2**20:.0f} MiB are free there")
        attend()
        time.sleep(LOOK_SECONDS)
    return time.monotonic() - begun if told >= 0 else 0.0


def patiently(
    work: Callable[[], T], folder: Path, num_bytes: int, tell: Callable[[str], object],
    *, most_seconds: float = float("inf"), attend: Callable[[], object] = lambda: None,
) -> T:  # fmt: skip
    """Do `work`, and do it again after each full disk that it met, as soon as there is room; see `wait_for_room`.

    Args:
        work: must be good for being done again from its beginning after an `OSError`.
        folder: on the disk that it writes to.
        num_bytes: of the largest file that it writes.
        tell: gets a line about the wait.
        most_seconds: of one wait.
        attend: called while it waits.

    Raises:
        OSError: the disk is full for `work` and has room for so many bytes, so that waiting would not help.
    """
    while True:
        try:
            return work()
        except OSError as error:
            if error.errno not in FULL:
                raise
            if (
                not 0.0
                < wait_for_room(folder, num_bytes, tell, most_seconds=most_seconds, attend=attend)
                <= most_seconds
            ):
                raise
