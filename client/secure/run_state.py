"""What a site remembers of a run with masked updates: its key, the newest round, and the one answer about its masks.

A masked update that was followed by a second one, or shares given back for a second list of survivors, would open what
the first has hidden. So each is remembered before it leaves, over restarts, and what cannot be read refuses.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from pydantic import Field, ValidationError

from client.home import Home
from client.private_files import private_files, write_private
from shared.errors import InputError
from shared.experiment.config import Section
from shared.messages.secure_sum.unmask import Shares
from shared.secure_aggregation.roster import Alias, Hex32, Roster, SecureSumError
from shared.storage.files import locked

MOST_RUNS = 16
"""Runs whose key is kept; without it nothing of a run can be given back any more."""
KEY_FILE, ROUND_FILE, LOCK_FILE = "key", "round.json", "lock"


class RoundState(Section):
    """The newest round that a masked update has left in."""

    server_round: int = Field(ge=1)
    request_digest: Hex32
    roster: Roster
    fewest: int = Field(0, ge=0)
    """Updates that have to be in the sum, where that is more than policy and threshold ask for."""
    survivors: tuple[Alias, ...] = ()
    """Of the one list that was answered; empty: none was."""
    shares: tuple[Shares, ...] = ()
    """The answer."""


class RunState:
    """The folder of one run; see `open_run`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def key(self) -> X25519PrivateKey:
        """The site's key for this run.

        Raises:
            SecureSumError: none was made, or it is gone.
        """
        try:
            return X25519PrivateKey.from_private_bytes((self._folder / KEY_FILE).read_bytes())
        except (FileNotFoundError, ValueError) as error:
            raise SecureSumError("this site has no key for the secure sums of this run") from error

    def make_key(self) -> X25519PrivateKey:
        """The same, made where there is none."""
        if not (self._folder / KEY_FILE).exists():
            write_private(self._folder / KEY_FILE, X25519PrivateKey.generate().private_bytes_raw())
        return self.key

    @property
    def newest(self) -> RoundState | None:
        """The newest round; None before the first.

        Raises:
            InputError: the file is damaged.
        """
        path = self._folder / ROUND_FILE
        try:
            return RoundState.model_validate(json.loads(path.read_bytes()))
        except FileNotFoundError:
            return None
        except (ValueError, ValidationError) as error:
            raise InputError(f"{path} is damaged: remove the folder; this run then needs to be started anew") from error

    def remember(self, state: RoundState) -> None:
        """Durable when this returns."""
        write_private(self._folder / ROUND_FILE, state.model_dump_json().encode())


@contextmanager
def open_run(home: Home, run: str) -> Iterator[RunState]:
    """Hold the state of a run; another process that answers for it waits."""
    folder = home.secure_sums / run
    with private_files():
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / LOCK_FILE):
            yield RunState(folder)


def forget_old_runs(home: Home) -> None:
    """Delete the oldest runs beyond those that are kept."""
    runs = sorted(home.secure_sums.iterdir(), key=lambda folder: folder.stat().st_mtime)
    for old in runs[:-MOST_RUNS]:
        shutil.rmtree(old, ignore_errors=True)
