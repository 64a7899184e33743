"""Files that only the site's own user may read: written in one step, refused where others can look into them."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shared.errors import InputError
from shared.storage.files import write_atomically


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


def write_private(path: Path, data: bytes) -> None:
    """Write `path` (0600) so that a reader, or a crash, sees the old content or all of the new."""
    with private_files():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data, 0o600)
