"""How long the stages of a round take."""

import contextlib
import time
from collections.abc import Iterator


class Stages:
    """Seconds that a round has spent, by stage."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """What is done inside belongs to the stage `name`."""
        start = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - start, 3)

    def total(self) -> float:
        """Seconds since the round began."""
        return round(time.monotonic() - self._start, 3)
