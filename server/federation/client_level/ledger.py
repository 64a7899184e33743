"""What client-level DP has spent, and the noise of the newest release: written down before it is used.

The ledger counts every release of every run of a coordinator's home: they all are about the same registered sites, so
runs that start from one another, runs started again and rounds repeated from an older checkpoint add up.
"""

import fcntl
import json
import os
from datetime import UTC, datetime
from pathlib import Path

from pydantic import Field, ValidationError

from server.federation.client_level.mechanism import KEY_BYTES
from shared.errors import InputError
from shared.experiment.config import Section, explain
from shared.storage.files import write_atomically

LEDGER_FILE = "central-ledger.jsonl"
NOISE_FILE = "central-noise.json"


class Release(Section):
    """One release that was paid for."""

    time: str
    run: str
    server_round: int = Field(ge=1)
    noise_multiplier: float = Field(gt=0, allow_inf_nan=False)
    inputs: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Digest of the request and of the updates that went in."""


class _Pending(Section):
    """The noise key of the newest release of a run, and what it was drawn for."""

    inputs: str
    key: str = Field(pattern=r"^[0-9a-f]{64}$")


class CentralLedger:
    """`central-ledger.jsonl` in the coordinator's home, append-only, mode 0600."""

    def __init__(self, home: Path) -> None:
        self.path = home / LEDGER_FILE

    def releases(self) -> list[Release]:
        """All releases so far.

        Raises:
            InputError: the ledger is damaged, so nobody knows what was spent.
        """
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        try:
            return [Release.model_validate_json(line) for line in lines]
        except ValidationError as error:
            raise InputError(
                f"{self.path} is damaged ({explain(error)}): restore it from a backup; without it client-level DP "
                "does not know what it has spent"
            ) from error

    def charge(self, run: str, server_round: int, noise_multiplier: float, inputs: str) -> None:
        """Count a release; it is on disk when this returns.

        Raises:
            InputError: the ledger is damaged.
        """
        self.releases()
        release = Release(
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            run=run,
            server_round=server_round,
            noise_multiplier=noise_multiplier,
            inputs=inputs,
        )
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with open(descriptor, "ab", buffering=0) as file:  # noqa: PTH123  # made with its mode
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(release.model_dump_json().encode() + b"\n")
            os.fsync(file.fileno())


class NoiseKeys:
    """Keys of one run's noise: fresh from the system for each release, the same again for the same inputs only."""

    def __init__(self, ledger: CentralLedger, run: str, run_folder: Path) -> None:
        self.ledger, self.run, self.path = ledger, run, run_folder / NOISE_FILE

    def key(self, server_round: int, noise_multiplier: float, inputs: str) -> bytes:
        """The key for a release of `inputs`, charged and stored before anybody uses it.

        A round that is repeated after a crash with the very same replies repeats its noise, and with it its result: it
        tells nothing new and costs nothing. Any other reply, weight or constant gets noise of its own.
        """
        pending = self._pending()
        if pending is not None and pending.inputs == inputs:
            return bytes.fromhex(pending.key)
        self.ledger.charge(self.run, server_round, noise_multiplier, inputs)
        key = os.urandom(KEY_BYTES)
        write_atomically(self.path, json.dumps({"inputs": inputs, "key": key.hex()}) + "\n", mode=0o600)
        return key

    def _pending(self) -> _Pending | None:
        """None also where the file is damaged: then the noise is new, and paid for."""
        try:
            return _Pending.model_validate_json(self.path.read_bytes())
        except (FileNotFoundError, ValidationError):
            return None
