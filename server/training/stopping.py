"""How a training is stopped: the first signal ends it after the running step, with a checkpoint; a second at once."""

import logging
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

ONE_WISH_SECONDS = 2.0
"""Under torchrun one Ctrl-C arrives twice, from the terminal and from the launcher; that is still one wish."""
log = logging.getLogger(__name__)


class _LeaveOffError(Exception):
    """Work that no checkpoint needs is left off."""


class StopWish:
    """Whether the process was asked to stop; true from the first signal on."""

    def __init__(self) -> None:
        self._first: float | None = None
        self._may_leave_off = False

    def __bool__(self) -> bool:
        """Whether a signal has come."""
        return self._first is not None

    def note(self, _number: int, _frame: FrameType | None) -> None:
        """Handle a signal: take the wish down, or leave off what is not needed.

        Raises:
            KeyboardInterrupt: it was asked for before.
        """
        if self._first is not None and time.monotonic() - self._first > ONE_WISH_SECONDS:
            raise KeyboardInterrupt
        if self._first is None:
            self._first = time.monotonic()
            log.info("stopping after the running step, with a checkpoint; again to stop at once")
        if self._may_leave_off:
            raise _LeaveOffError

    def do_unless_stopped(self, work: Callable[[], None]) -> None:
        """Do what nobody needs to go on: a signal breaks it off, and after one it is not begun."""
        try:
            self._may_leave_off = True
            try:
                if not self:
                    work()
            finally:
                self._may_leave_off = False
        except _LeaveOffError:
            log.info("left off")


@contextmanager
def stop_signals() -> Iterator[StopWish]:
    """The wish that SIGINT and SIGTERM fill while the block runs."""
    wish = StopWish()
    before = {number: signal.signal(number, wish.note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield wish
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
