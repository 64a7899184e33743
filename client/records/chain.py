"""Append-only files of JSON lines in which each line carries the hash of the one before.

A line is canonical JSON whose last field is the SHA-256 of everything before that field; it ends with a newline that is
written in the same call and fsynced before `append` returns. So a last line without newline was never acknowledged and
may be set aside, while any other irregularity is damage and stops the site. Each line has a random salt: two copies of
a chain that go on by the same fields end with different hashes.
"""

import datetime as dt
import fcntl
import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pydantic_core import from_json

from client.private_files import check_private, private_files, with_room, write_private
from shared.errors import InputError
from shared.storage.files import append_whole, canonical_json, sync_file

SCHEMA_VERSION = 1
START = "0" * 64
_SUFFIX_BYTES = len(',"~hash":""}') + 64
_SALT_BYTES = 16


class ChainError(InputError):
    """The file is damaged, of another schema, or older than what was seen before."""


class BusyError(InputError):
    """Another process holds the file."""


class Head(NamedTuple):
    """Where a chain ends: what an older copy cannot have."""

    sequence: int
    hash: str


@dataclass(frozen=True)
class Entry:
    """One checked line."""

    sequence: int
    time: dt.datetime
    kind: str
    fields: dict[str, Any]
    hash: str


class Chain:
    """A chain opened for writing by one process; `entries` grows with each append."""

    def __init__(self, path: Path, descriptor: int, entries: list[Entry]) -> None:
        self.path, self.entries = path, entries
        self._descriptor = descriptor

    @property
    def head(self) -> Head | None:
        """Sequence and hash of the newest entry; None while the chain is empty."""
        return Head(self.entries[-1].sequence, self.entries[-1].hash) if self.entries else None

    def append(self, kind: str, **fields: Any) -> Entry:  # noqa: ANN401  # any JSON value
        """Write one entry; when this returns it survives a power cut.

        Raises:
            OSError: it could not be written, for example because the disk is full; the file is as before.
        """
        previous = self.entries[-1].hash if self.entries else START
        now = dt.datetime.now(dt.UTC)
        line, digest = _line(len(self.entries), now, kind, fields, previous)
        with_room(lambda: append_whole(self._descriptor, line, is_durable=True), self.path.parent, len(line))
        self.entries.append(Entry(len(self.entries), now, kind, fields, digest))
        return self.entries[-1]


@contextmanager
def open_chain(path: Path, *, wait: bool) -> Iterator[Chain]:
    """Open for appending under an exclusive lock; a torn last line is set aside and recorded as `recovered`.

    Args:
        path: the file, made with mode 0600 when missing.
        wait: wait for another writer instead of failing.

    Raises:
        BusyError: another process holds it, and `wait` is off.
        ChainError: the chain is damaged.
        InputError: others can read the file.
    """
    with private_files():
        path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise BusyError(f"{path} is in use by another process: wait for its round to end") from error
        check_private(path)
        with_room(lambda: sync_file(path.parent), path.parent, 0)
        data = path.read_bytes()
        entries, torn = parse_chain(data, path.name)
        chain = Chain(path, descriptor, entries)
        if torn:
            write_private(path.with_name(f"{path.name}.torn-{len(entries)}"), torn)
            os.ftruncate(descriptor, len(data) - len(torn))
            chain.append("recovered", torn_bytes=len(torn), torn_sha256=hashlib.sha256(torn).hexdigest())
        yield chain
    finally:
        os.close(descriptor)


def read_chain(path: Path) -> list[Entry]:
    """Check and return all entries without locking; a torn last line is left alone. A missing file has none.

    Raises:
        ChainError: the chain is damaged.
    """
    return parse_chain(path.read_bytes(), path.name)[0] if path.exists() else []


class ChainReader:
    """Follows a chain that grows: each call checks and returns the entries that are new, without locking."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = self._number = 0
        self._previous = START

    def read_new(self) -> list[Entry]:
        """Entries that no call has returned yet; a torn last line waits for its end, a missing file has none.

        Raises:
            ChainError: the chain is damaged, or another file stands in its place.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
                size = os.fstat(file.fileno()).st_size
        except FileNotFoundError:
            return []
        if size < self._offset:
            raise ChainError(f"{self.path.name}: shorter than before: restore the newest copy")
        entries, torn = parse_chain(data, self.path.name, self._number, self._previous)
        self._offset += len(data) - len(torn)
        self._number += len(entries)
        self._previous = entries[-1].hash if entries else self._previous
        return entries


def parse_chain(data: bytes, name: str, first: int = 0, previous: str = START) -> tuple[list[Entry], bytes]:
    """Check every line of `data`; return the entries and what follows the last newline.

    Args:
        data: whole lines, and perhaps the beginning of one.
        name: of the file, for the error.
        first: sequence number of the first line.
        previous: hash of the line before it.

    Raises:
        ChainError: with the number of the first bad line.
    """
    *lines, torn = data.split(b"\n")
    entries: list[Entry] = []
    for number, line in enumerate(lines, first):
        body, seal = line[:-_SUFFIX_BYTES], line[-_SUFFIX_BYTES:]
        digest = hashlib.sha256(body).hexdigest()
        if seal != _seal(digest):
            raise ChainError(f"{name}: line {number + 1} is damaged: stop, keep the file, restore the newest copy")
        entry = from_json(line, allow_inf_nan=False)
        if entry.get("schema") != SCHEMA_VERSION:
            raise ChainError(
                f"{name}: line {number + 1} has schema {entry.get('schema')}, this version reads {SCHEMA_VERSION}"
            )
        if entry["sequence"] != number or entry["previous"] != previous:
            raise ChainError(f"{name}: line {number + 1} does not follow the line before: lines are missing or moved")
        previous = digest
        time = dt.datetime.fromisoformat(entry["time"])
        entries.append(Entry(number, time, entry["kind"], entry["fields"], previous))
    return entries, torn


def _line(sequence: int, time: dt.datetime, kind: str, fields: dict[str, Any], previous: str) -> tuple[bytes, str]:
    entry = {"fields": fields, "kind": kind, "previous": previous, "schema": SCHEMA_VERSION, "sequence": sequence}
    entry |= {"salt": secrets.token_hex(_SALT_BYTES), "time": time.isoformat(timespec="milliseconds")}
    body = canonical_json(entry)[:-1]
    digest = hashlib.sha256(body).hexdigest()
    return body + _seal(digest) + b"\n", digest


def _seal(digest: str) -> bytes:
    # "~" sorts after every letter, so the sealed line is canonical JSON as well.
    return b',"~hash":"%s"}' % digest.encode()
