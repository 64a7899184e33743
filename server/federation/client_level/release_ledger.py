"""What client-level DP has spent, and the noise of the newest release: written down before it is used.

The ledger counts every release of every run of a coordinator's home: they all are about the same registered sites, so
runs that start from one another, runs started again and rounds repeated from an older checkpoint add up.
"""

import fcntl
import hashlib
import json
import os
from datetime import UTC, datetime
from pathlib import Path

from pydantic import Field, ValidationError

from server.federation.client_level.mechanism import KEY_BYTES
from shared.errors import InputError
from shared.experiment.config import Section, explain
from shared.storage.files import append_whole, write_atomically

LEDGER_FILE = "central-ledger.jsonl"
NOISE_FILE = "central-noise.json"


class PaidRelease(Section):
    """One release that was paid for."""

    time: str
    run: str
    server_round: int = Field(ge=1)
    noise_multiplier: float = Field(gt=0, allow_inf_nan=False)
    inputs: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Digest of the request and of the updates that went in."""
    previous: str = Field("", pattern=r"^([0-9a-f]{64})?$")
    """SHA-256 of the line before; empty in the first line, and in lines of versions without it."""


class _Pending(Section):
    """The noise key of the newest release of a run, and what it was drawn for."""

    inputs: str
    key: str = Field(pattern=r"^[0-9a-f]{64}$")


class CentralLedger:
    """`central-ledger.jsonl` in the coordinator's home, append-only, mode 0600; a chain of hashes ties its lines."""

    def __init__(self, home: Path) -> None:
        self.path = home / LEDGER_FILE

    def releases(self) -> list[PaidRelease]:
        """All releases so far. A line without its end was cut off by a crash, before anything was released for it.

        Raises:
            InputError: the ledger is damaged, so nobody knows what was spent.
        """
        return [release for _, release in self._entries()]

    def _entries(self) -> list[tuple[bytes, PaidRelease]]:
        """Whole lines and what they say, each checked against the line before."""
        if not self.path.exists():
            return []
        entries: list[tuple[bytes, PaidRelease]] = []
        for number, line in enumerate(self.path.read_bytes().split(b"\n")[:-1], start=1):
            try:
                release = PaidRelease.model_validate_json(line)
            except ValidationError as error:
                raise self._damaged(f"line {number}: {explain(error)}") from error
            is_chained = any(before.previous for _, before in entries)
            if (release.previous or is_chained) and release.previous != _hash_of_last(entries):
                raise self._damaged(f"line {number} does not follow on the one before it")
            entries.append((line, release))
        return entries

    def _damaged(self, how: str) -> InputError:
        return InputError(
            f"{self.path} is damaged ({how}): restore the newest copy; without it client-level DP does not know what "
            "it has spent"
        )

    def charge(self, run: str, server_round: int, noise_multiplier: float, inputs: str) -> None:
        """Count a release; it is on disk when this returns.

        Raises:
            InputError: the ledger is damaged.
            OSError: the disk is full; nothing is counted, and nothing may be released.
        """
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with open(descriptor, "ab", buffering=0) as file:  # noqa: PTH123  # made with its mode
            fcntl.flock(file, fcntl.LOCK_EX)
            entries = self._entries()
            release = PaidRelease(
                time=datetime.now(UTC).isoformat(timespec="seconds"),
                run=run,
                server_round=server_round,
                noise_multiplier=noise_multiplier,
                inputs=inputs,
                previous=_hash_of_last(entries),
            )
            os.ftruncate(descriptor, sum(len(line) + 1 for line, _ in entries))  # without a line that was cut off
            append_whole(descriptor, release.model_dump_json().encode() + b"\n", is_durable=True)


def _hash_of_last(entries: list[tuple[bytes, PaidRelease]]) -> str:
    return hashlib.sha256(entries[-1][0]).hexdigest() if entries else ""


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
