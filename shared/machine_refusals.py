"""What the machine refused, in one line: where, and what to do about it. No torch."""

import contextlib
import errno
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_CURES = {
    errno.ENOENT: "give a path that exists",
    errno.ENOTDIR: "give a path whose parts are folders",
    errno.EISDIR: "give a file",
    errno.EACCES: "give one that this user may use, or run this as its owner",
    errno.EPERM: "give one that this user may use, or run this as its owner",
    errno.EROFS: "this file system is mounted read-only: give a path on another one",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.EMFILE: "`ulimit -n` is too small for this: raise it",
    errno.ENFILE: "this machine has too many files open: end other programs",
    errno.ENOMEM: "this machine has too little memory free: end other programs",
    errno.EIO: "the disk fails: see the kernel's log",
}
_ROOM_BYTES = 2**20


def os_error_text(error: OSError) -> str:
    """One line of what the machine refused, where, and what to do about it."""
    places = " and ".join(str(place) for place in (error.filename, error.filename2) if place is not None)
    if error.errno in _FULL:
        # Writing to an open file does not tell its name: then whatever the command line points at is looked at.
        full = " ".join(places.split()) or ", ".join(full_places()) or "a disk"
        return f"{full}: {error.strerror}; free some space there, then run the command again"
    places = places or ("the folder that this runs in" if error.errno == errno.ENOENT else "")
    text = f"{places}: {error.strerror}" if places and error.strerror else error.strerror or str(error)
    cure = _CURES.get(error.errno or 0)
    return " ".join(text.split()) + (f"; {cure}" if cure else "")


def is_output_lost() -> bool:
    """Whether what was printed cannot be written: a full disk, or a reader that has gone.

    Python would say so once more when it ends, in lines of its own and with an exit status of its own: from then on
    output goes nowhere.
    """
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)
        return True
    return False


def full_places() -> list[str]:
    """Folders that this command may write to and that have no megabyte left, with what they have."""
    found = {}
    for folder in _folders():
        room = os.statvfs(folder)
        if room.f_bavail * room.f_frsize < _ROOM_BYTES or (room.f_files and not room.f_favail):
            found[folder.stat().st_dev] = f"{folder} ({room.f_bavail * room.f_frsize} bytes free)"
    return list(found.values())


def _folders() -> Iterator[Path]:
    """Folders that the command line, the environment and the machine name."""
    named = [argument.rpartition("=")[2] for argument in sys.argv[1:]]
    named += [value for name, value in os.environ.items() if name.startswith("MASKFED_")]
    for each in [*named, tempfile.gettempdir(), "."]:
        with contextlib.suppress(OSError, ValueError):  # most arguments are no paths
            path = Path(each).resolve()
            yield from [place for place in (path, path.parent) if place.is_dir()][:1]
