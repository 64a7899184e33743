"""Files that readers see whole or not at all, whatever crashes."""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from shared.errors import InputError

TEMPORARY_PREFIX = ".incomplete-"


def with_name(path: Path) -> Path:
    """The path by its own name where it has one, else (`.`, `..`, the root) as an absolute path."""
    return path if path.name not in ("", "..") else path.resolve()


def remove_folder(folder: Path) -> None:
    """Delete a folder; under its own name it vanishes at once, never file by file."""
    if not folder.exists():
        return
    doomed = folder.parent / f"{TEMPORARY_PREFIX}removed-{folder.name}-{os.getpid()}"
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


@contextmanager
def locked(path: Path, problem: str = "") -> Iterator[None]:
    """Hold the lock file `path`, which is made; the kernel lets go of it when the process ends, however it ends.

    Args:
        path: the lock file; while it is held it names the process and its machine.
        problem: what to say when another process holds it, before its name; empty: wait for it.

    Raises:
        InputError: another process holds it, and `problem` is not empty.
    """
    while True:
        with path.open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if problem else 0))
            except BlockingIOError as error:
                file.seek(0)
                holder = " ".join(file.read(200).split()) or "another process"
                raise InputError(f"{problem} {holder}: wait for it or stop it") from error
            # A holder may have deleted the file at its end, and a third process made it anew.
            if not _is_file_at(path, file.fileno()):
                continue
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            yield
            return


def _is_file_at(path: Path, descriptor: int) -> bool:
    """Whether the open file is the one that `path` names now."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def machine_errors(path: Path) -> Iterator[None]:
    """What the machine refuses while a library writes `path` comes as `OSError`, whatever the library makes of it.

    safetensors tells the system's number in the text of an error of its own; NumPy tells only how much was written, and
    torch not even that.

    Raises:
        OSError: with number and path.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        told = re.search(r"os error (\d+)|requested and \d+ written|enforce fail at inline_container", str(error))
        if told is None:
            raise
        number = int(told[1] or errno.ENOSPC)
        text = os.strerror(number) if told[1] else "the disk is full, or files may not be so large"
        raise OSError(number, text, str(path)) from error


def file_digest(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_json(value: object) -> bytes:
    """One byte string per value: sorted keys, no spaces; what digests and hash chains are computed from."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def sync_file(path: Path) -> None:
    """Force a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, data: str | bytes, mode: int = 0o644) -> None:
    """Write a file under a temporary name, force it to disk and rename it; readers see the old or the new content."""
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{os.getpid()}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_file(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def append_whole(descriptor: int, data: bytes, *, is_durable: bool = False) -> None:
    """Append all of `data`, or nothing: a full disk takes a part and says nothing before the next write.

    Args:
        descriptor: opened for appending; nobody else writes meanwhile.
        data: to append.
        is_durable: on disk when this returns.

    Raises:
        OSError: it could not be written; the file is as before.
    """
    size = os.fstat(descriptor).st_size
    try:
        while data:
            data = data[os.write(descriptor, data) :]
        if is_durable:
            os.fsync(descriptor)
    except OSError:
        os.ftruncate(descriptor, size)
        raise
