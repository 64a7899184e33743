"""Whose images are whose on this machine: one registry that all homes share, so that two of them see each other.

A folder with one secret key. Each data set leaves HMACs of its files under that key and, for each ledger, a copy of its
charges. Who shares a file shares the budget: `ledger.py` takes over the charges of the others before it adds its own.
The folder belongs to group `maskfed` (mode 2770); where this user has no right to it, each user has one of their own.
"""

import fcntl
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, Field, ValidationError

from client.private_files import with_room
from client.records.chain import BusyError
from client.records.spending import Charge
from shared.errors import InputError
from shared.experiment.config import Section
from shared.paths import user_folder
from shared.storage.files import write_atomically

REGISTRY_VARIABLE = "MASKFED_REGISTRY"
MACHINE_FOLDER = Path("/var/lib/maskfed-registry")
KEY_FILE = "machine.key"
KEY_BYTES = 32
LOCK_SECONDS, MOST_BYTES = 60.0, 1 << 30
"""Files of others are not read beyond this; the records of four million images fit."""
_ID = r"^[0-9a-f]{32}$"
Model = TypeVar("Model", bound=BaseModel)


class Identity(Section):
    """A data set as the other homes see it."""

    schema_version: int = Field(1, ge=1, le=1)
    dataset_id: str = Field(pattern=_ID)
    ledger_id: str = Field(pattern=_ID)
    home: str
    """Where it lives: what a line to the operator names."""
    key_id: str
    """Of the machine's key: records under another one cannot be compared."""
    fingerprint: str
    linked: tuple[str, ...]
    """Data sets that share files with it."""


class Records(Section):
    """HMACs of every file a data set has ever held, under the machine's key: held out, trained on, or neither."""

    schema_version: int = Field(1, ge=1, le=1)
    key_id: str
    records: dict[str, bool | None]


class Charges(Section):
    """The charges of one ledger with their sequence numbers."""

    schema_version: int = Field(1, ge=1, le=1)
    charges: tuple[tuple[int, Charge], ...]


def registry_folder() -> Path:
    """MASKFED_REGISTRY, else the machine's folder where this user may write to it, else one of this user.

    Raises:
        InputError: MASKFED_REGISTRY is not absolute.
    """
    if named := os.environ.get(REGISTRY_VARIABLE):
        if not Path(named).is_absolute():
            raise InputError(f"{REGISTRY_VARIABLE} {named!r}: give an absolute path")
        return Path(named)
    if os.access(MACHINE_FOLDER, os.R_OK | os.W_OK | os.X_OK):
        return MACHINE_FOLDER
    return user_folder("XDG_STATE_HOME", ".local", "state") / "maskfed" / "registry"


class DataRegistry:
    """The registry in one folder; what others have written there is checked before it is used."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def is_shared(self) -> bool:
        """Whether several users share it: new files keep the folder's group."""
        return bool(self.folder.stat().st_mode & stat.S_ISGID)

    def prepare(self) -> None:
        """Make the folder, for this user alone, where there is none.

        Raises:
            InputError: everybody can look into it.
        """
        if not self.folder.exists():
            self.folder.mkdir(mode=0o700, parents=True)
        mode = stat.S_IMODE(self.folder.stat().st_mode)
        if mode & 0o007:
            raise InputError(f"{self.folder} has mode {mode:04o}, others may look: chmod o-rwx {self.folder}")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Be the only one who reads and writes.

        Raises:
            BusyError: another home holds it for a minute.
            InputError: the folder is open to everybody, or not writable.
        """
        self.prepare()
        with self._open_lock() as descriptor:
            deadline = time.monotonic() + LOCK_SECONDS
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError as error:
                    if time.monotonic() > deadline:
                        raise BusyError(f"{self.folder} is held by another home: is a scan of it stuck?") from error
                    time.sleep(0.02)
            yield

    def machine_key(self) -> bytes:
        """The secret of this machine; made once, in an empty registry, under the lock.

        Raises:
            InputError: it is lost while records under it are there, or damaged.
        """
        path = self.folder / KEY_FILE
        if not path.exists():
            if any(self.folder.glob("*.json")):
                raise InputError(
                    f"{path} is missing: restore it; if it is lost, remove {self.folder} and scan again in every home"
                )
            self.write(KEY_FILE, os.urandom(KEY_BYTES))
        key = self.read(KEY_FILE)
        if len(key) != KEY_BYTES:
            raise InputError(f"{path} is damaged: restore it, or remove {self.folder} and scan again in every home")
        return key

    def identities(self) -> dict[str, Identity]:
        """Every data set of the machine by its id.

        Raises:
            InputError: a file is damaged.
        """
        found = {}
        for path in sorted(self.folder.glob("*.json")):
            identity = self.load(path.name, Identity)
            if path.name != f"{identity.dataset_id}.json":
                raise self._damaged(path.name)
            found[identity.dataset_id] = identity
        return found

    def knows(self, dataset_id: str, fingerprint: str, machine_key_id: str) -> bool:
        """Whether a data set is entered with this generation, under this key of the machine.

        Raises:
            InputError: its file is damaged.
        """
        name = f"{dataset_id}.json"
        if not (self.folder / name).exists():
            return False
        identity = self.load(name, Identity)
        return (identity.dataset_id, identity.fingerprint, identity.key_id) == (dataset_id, fingerprint, machine_key_id)

    def records(self, dataset_id: str, machine_key_id: str) -> Records | None:
        """What a data set has ever held; None where that is lost, damaged or under another key."""
        try:
            found = self.load(f"{dataset_id}.records", Records)
        except InputError:
            return None
        return found if found.key_id == machine_key_id else None

    def publish(self, identity: Identity, records: Records) -> None:
        """Write a data set, its records first; it counts as shared from then on."""
        self.write(f"{identity.dataset_id}.records", records.model_dump_json().encode())
        self.write(f"{identity.dataset_id}.json", identity.model_dump_json().encode())

    def charges(self, ledger_id: str) -> tuple[tuple[int, Charge], ...]:
        """What a ledger has published; nothing before its first charge.

        Raises:
            InputError: the file is damaged.
        """
        name = f"{ledger_id}.charges"
        return self.load(name, Charges).charges if (self.folder / name).exists() else ()

    def publish_charges(self, ledger_id: str, charges: list[tuple[int, Charge]]) -> bytes:
        """Replace what a ledger has published; the bytes of the file."""
        data = Charges(charges=tuple(charges)).model_dump_json().encode()
        self.write(f"{ledger_id}.charges", data)
        return data

    def load(self, name: str, model: type[Model]) -> Model:
        """What a file says; `InputError` where it is missing or damaged."""
        try:
            return model.model_validate_json(self.read(name))
        except ValidationError as error:
            raise self._damaged(name) from error

    def _damaged(self, name: str) -> InputError:
        return InputError(f"{self.folder / name} is damaged: restore it, or remove it and scan again in its home")

    def read(self, name: str) -> bytes:
        """The bytes of a file; `InputError` for a link or a pipe that somebody of the group has put there."""
        try:
            descriptor = os.open(self.folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise self._damaged(name) from error
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_size > MOST_BYTES:
                raise InputError(f"{self.folder / name} is no file of a registry: remove it")
            return file.read()

    def write(self, name: str, data: bytes) -> None:
        """Replace a file in one step, for this user or the group."""
        with self._new_mode() as mode:
            with_room(lambda: write_atomically(self.folder / name, data, mode), self.folder, len(data))

    @contextmanager
    def _new_mode(self) -> Iterator[int]:
        """The mode of a new file, whatever the process masks."""
        before = os.umask(0)
        try:
            yield 0o660 if self.is_shared else 0o600
        finally:
            os.umask(before)

    @contextmanager
    def _open_lock(self) -> Iterator[int]:
        try:
            with self._new_mode() as mode:
                descriptor = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
        except OSError as error:
            raise InputError(f"{self.folder}: {error.strerror}; join its group, or set {REGISTRY_VARIABLE}") from error
        try:
            yield descriptor
        finally:
            os.close(descriptor)


def existing_registry() -> DataRegistry | None:
    """The registry in use; None before the first scan has made it."""
    folder = registry_folder()
    return DataRegistry(folder) if folder.is_dir() else None
