"""A small disk of its own for a folder, and a way to fill it."""

import errno
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.scratch import scratch

BALLAST = "ballast"
SMALLEST_BYTES = 4096


def reason_against() -> str | None:
    """Why no file system can be mounted here; None when one can."""
    with scratch() as folder:
        try:
            with small_disk(folder, 2**20):
                return None
        except (OSError, subprocess.CalledProcessError) as error:
            return f"a small disk needs the right to mount one ({error})"


@contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[Path]:
    """A file system of so many bytes at `folder`, in memory; it goes with the block, and everything on it."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def fill(folder: Path, seconds: float) -> None:
    """Take every free byte of the disk for some seconds; whoever frees some loses it again at once."""
    ballast, end = folder / BALLAST, time.monotonic() + seconds
    descriptor = os.open(ballast, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        while time.monotonic() < end:
            _take_what_is_free(descriptor, folder)
            time.sleep(0.05)
    finally:
        os.close(descriptor)
        ballast.unlink()


def _take_what_is_free(descriptor: int, folder: Path) -> None:
    piece = 2**27
    while piece >= SMALLEST_BYTES:
        try:
            os.posix_fallocate(descriptor, os.fstat(descriptor).st_size, piece)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise OSError(error.errno, os.strerror(error.errno), str(folder)) from error
            piece //= 2
