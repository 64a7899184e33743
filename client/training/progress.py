"""How far the running round is: a small private file that the training writes and `start` shows. No torch.

The writer holds a lock on the file for as long as the round runs, so what a killed round has left is never shown.
"""

import fcntl
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from client.home import Home
from client.private_files import private_files

FILE = "progress"
RECORD_BYTES = 512
TRIES = 20
log = logging.getLogger("maskfed.client")


class Progress(NamedTuple):
    """A round that is being trained."""

    run: str
    server_round: int
    steps_done: int
    steps: int


@contextmanager
def told(home: Home, run: str, server_round: int, steps: int) -> Iterator[Callable[[int], None]]:
    """Tell whoever looks how many of the steps are done, by the function yielded, for as long as the block runs.

    A file that cannot be written stops no round.
    """
    try:
        descriptor = _open(home)
    except OSError as error:
        log.warning("no progress is shown: %s", error)
        yield lambda _: None
        return

    def tell(steps_done: int) -> None:
        record = json.dumps(Progress(run, server_round, steps_done, steps)).encode().ljust(RECORD_BYTES)
        try:
            os.pwrite(descriptor, record, 0)
        except OSError as error:
            log.warning("no progress is shown: %s", error)

    try:
        tell(0)
        yield tell
    finally:
        os.close(descriptor)


def read_progress(home: Home) -> Progress | None:
    """The round that is being trained now, or None."""
    try:
        with (home.path / FILE).open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return Progress(*json.loads(file.read(RECORD_BYTES)))
    except (OSError, ValueError, TypeError):
        pass
    return None


def _open(home: Home) -> int:
    with private_files():
        descriptor = os.open(home.path / FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    for _ in range(TRIES):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # somebody looks at it, for an instant
            time.sleep(0.01)
        else:
            os.ftruncate(descriptor, 0)
            return descriptor
    os.close(descriptor)
    raise BlockingIOError("another round writes its progress")
