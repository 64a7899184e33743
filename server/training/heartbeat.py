"""A sign of life at least every so many seconds, where no bar is seen: what goes on, and for how long."""

import threading
import time
from collections.abc import Callable

LOOK_SECONDS = 1.0


class Heartbeat:
    """Says what goes on when nothing else was said for `seconds`, between `start` and `stop`."""

    def __init__(self, say: Callable[[str], None], seconds: float, look_seconds: float = LOOK_SECONDS) -> None:
        self._say, self._seconds, self._look_seconds = say, seconds, look_seconds
        self._doing, self._since = "starting", time.monotonic()
        self._spoken = self._since
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="heartbeat")

    def start(self) -> None:
        """Begin to listen."""
        self._thread.start()

    def stop(self) -> None:
        """Fall silent, whether it has begun or not."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def does(self, what: str) -> None:
        """Something else goes on from now."""
        self._doing, self._since = what, time.monotonic()

    def spoke(self) -> None:
        """Somebody else has just said something."""
        self._spoken = time.monotonic()

    @property
    def is_due(self) -> bool:
        """Whether something should be said."""
        return time.monotonic() - self._spoken >= self._seconds

    def _beat(self) -> None:
        while not self._ended.wait(self._look_seconds):
            if self.is_due:
                self._say(f"{self._doing}, for {time.monotonic() - self._since:.0f} s")
                self.spoke()
