"""Whether what runs still answers: alive is not healthy, a process that hangs never exits."""

import logging
import threading
from collections.abc import Callable, Mapping

logger = logging.getLogger(__name__)

CHECK_SECONDS = 10.0
MOST_MISSES = 3


class Liveness:
    """Asks each service every `CHECK_SECONDS`, in a thread of its own; one that misses three times in a row hangs."""

    def __init__(self, probes: Mapping[str, Callable[[], bool]], seconds: float = CHECK_SECONDS) -> None:
        self._probes, self._seconds = dict(probes), seconds
        self._misses: dict[str, int] = {}
        self._lock, self._closed = threading.Lock(), threading.Event()

    def start(self) -> None:
        """Begin to ask; ends with `close` or with the process."""
        threading.Thread(target=self._ask_forever, daemon=True, name="liveness").start()

    def close(self) -> None:
        """Ask no more."""
        self._closed.set()

    def hangs(self, name: str) -> bool:
        """Whether a service did not answer `MOST_MISSES` times in a row."""
        return self.misses(name) >= MOST_MISSES

    def misses(self, name: str) -> int:
        """How often in a row a service did not answer."""
        with self._lock:
            return self._misses.get(name, 0)

    def forget(self, name: str) -> None:
        """Count from zero again: the service was just started."""
        with self._lock:
            self._misses.pop(name, None)

    def check(self) -> None:
        """Ask every service once."""
        for name, probe in self._probes.items():
            is_answering = _answers(name, probe)
            with self._lock:
                self._misses[name] = 0 if is_answering else self._misses.get(name, 0) + 1
                misses = self._misses[name]
            if 0 < misses <= MOST_MISSES:
                logger.warning("%s does not answer (%d of %d)", name, misses, MOST_MISSES)

    def _ask_forever(self) -> None:
        while not self._closed.wait(self._seconds):
            self.check()


def _answers(name: str, probe: Callable[[], bool]) -> bool:
    try:
        return probe()
    except Exception as error:  # whatever a check raises must not end the checking
        logger.warning("checking %s: %s: %s", name, type(error).__name__, error)
        return False
