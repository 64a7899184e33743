"""What a site remembers of a run with masked updates: its key, the newest round, and the one answer about its masks.

A masked update that was followed by a second one, or shares given back for a second list of survivors, would open what
the first has hidden. So each is remembered before it leaves, over restarts, and what cannot be read refuses. How often
something was remembered also stands beside the ledger's head, outside of the home: where a home is put back from a
backup it has forgotten what left, and its runs are over.
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
from client.settings import load_settings
from shared.errors import InputError
from shared.experiment.config import Section
from shared.messages.secure_sum.unmask import Shares
from shared.secure_aggregation.roster import Alias, Hex32, Roster, SecureSumError
from shared.storage.files import locked

MOST_RUNS = 16
"""Runs whose key is kept; without it nothing of a run can be given back any more."""
KEY_FILE, ROUND_FILE, LOCK_FILE = "key", "round.json", "lock"
WITNESSES = ".sums"
"""Behind the name of the head file: the folder of the counts, a file for each run."""


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
    sequence: int = Field(0, ge=0)
    """Times that something was remembered in this run, this one included."""


class RunState:
    """The folder of one run; see `open_run`."""

    def __init__(self, folder: Path, witness: Path) -> None:
        self._folder, self._witness = folder, witness

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
            SecureSumError: it is an older copy than what has left, or nobody can tell.
        """
        path = self._folder / ROUND_FILE
        try:
            newest = RoundState.model_validate(json.loads(path.read_bytes()))
        except FileNotFoundError:
            newest = None
        except (ValueError, ValidationError) as error:
            raise InputError(f"{path} is damaged: remove the folder; this run then needs to be started anew") from error
        self._check_newest(0 if newest is None else newest.sequence)
        return newest

    def _check_newest(self, sequence: int) -> None:
        seen = self._seen()
        if sequence == seen + 1:
            # Killed between the two files. Nothing has left by then; what leaves next needs the count.
            self._witness_that(sequence)
        elif sequence != seen:
            raise SecureSumError("this site's memory of the run's sums is not its newest copy: it takes no more part")

    def remember(self, state: RoundState) -> None:
        """Durable when this returns, here and outside of the home."""
        newest = self.newest
        sequence = 1 if newest is None else newest.sequence + 1
        kept = state.model_copy(update={"sequence": sequence})
        write_private(self._folder / ROUND_FILE, kept.model_dump_json().encode())
        self._witness_that(sequence)

    def _witness_that(self, sequence: int) -> None:
        write_private(self._witness, f"{sequence}\n".encode())

    def _seen(self) -> int:
        try:
            return int(self._witness.read_text(encoding="ascii"))
        except FileNotFoundError:
            return 0
        except ValueError as error:
            raise InputError(f"{self._witness} is damaged: remove it; this run is then over for this site") from error


@contextmanager
def open_run(home: Home, run: str, *, is_new: bool = False) -> Iterator[RunState]:
    """Hold the state of a run; another process that answers for it waits.

    Nothing is made for a run that this site knows nothing of, unless it `is_new`: a coordinator may ask for many.

    Raises:
        SecureSumError: such a run.
    """
    folder, witness = home.secure_sums / run, witnesses(home) / run
    if not is_new and not folder.is_dir():
        _ = RunState(folder, witness).newest  # Where a backup was put back, that is the reason.
        raise SecureSumError("this site has no key for the secure sums of this run and sent nothing masked in it")
    with private_files():
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / LOCK_FILE):
            yield RunState(folder, witness)


def witnesses(home: Home) -> Path:
    """The folder outside of the home that says how often each run has remembered something."""
    head_file = Path(load_settings(home).head_file)
    return head_file.with_name(f"{head_file.name}{WITNESSES}")


def forget_old_runs(home: Home) -> None:
    """Delete the oldest runs beyond those that are kept; their counts stay, or an older copy could come back."""
    runs = sorted(home.secure_sums.iterdir(), key=lambda folder: folder.stat().st_mtime)
    for old in runs[:-MOST_RUNS]:
        shutil.rmtree(old, ignore_errors=True)
