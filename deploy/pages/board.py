"""What the live page shows now, read once for all who watch, and only while somebody watches."""

import asyncio
import contextlib
import json
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
MOST_SHARE = 0.2
"""Of a processor that reading may take: after a look that took long, the next waits longer."""


class Board:
    """Parts of a page by id, each with the number of its last change."""

    def __init__(self, read: Callable[[], list[dict[str, object]]], look_seconds: float = LOOK_SECONDS) -> None:
        self._read, self._look_seconds = read, look_seconds
        self._reading = threading.Lock()
        self._parts: dict[str, tuple[int, bytes]] = {}
        self._number = 0
        self._watchers = 0
        self._looking: asyncio.Task[None] | None = None
        self._change = asyncio.Event()

    @contextlib.asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Keep the parts fresh within the block."""
        self._watchers += 1
        if self._looking is None:
            self._looking = asyncio.ensure_future(self._look_forever())
        try:
            yield
        finally:
            self._watchers -= 1
            if not self._watchers and self._looking is not None:
                self._looking.cancel()
                self._looking = None

    def newer(self, number: int) -> tuple[int, bytes]:
        """The number of the newest change, and a line of JSON for each part that changed after `number`."""
        return self._number, b"".join(line for changed, line in self._parts.values() if changed > number)

    async def changed(self, number: int, gone: "asyncio.Future[None]", most_seconds: float) -> None:
        """Wait until something changes after `number`, `gone` is done, or the time is over."""
        if self._number != number:
            return
        change = asyncio.ensure_future(self._change.wait())
        either: set[asyncio.Future[Any]] = {change, gone}
        await asyncio.wait(either, timeout=most_seconds, return_when=asyncio.FIRST_COMPLETED)
        change.cancel()

    def take(self, parts: list[dict[str, object]]) -> None:
        """Put what was read in place of what is there."""
        order: dict[str, object] = {"id": "order", "parts": [part["id"] for part in parts]}
        found = {}
        for part in [order, *parts]:
            name, line = str(part["id"]), json.dumps(part, allow_nan=False).encode() + b"\n"
            number, before = self._parts.get(name, (0, b""))
            if line != before:
                self._number += 1
                number = self._number
            found[name] = (number, line)
        if found != self._parts:  # a part that is gone has changed the order
            self._parts = found
            self._change.set()
            self._change = asyncio.Event()

    async def _look_forever(self) -> None:
        while True:
            begun = time.monotonic()
            try:
                self.take(await asyncio.to_thread(self._read_alone))
            except Exception as error:  # what cannot be read now is told, and looked at again
                logger.warning("%s: %s", type(error).__name__, error)
                text = f"{type(error).__name__}: the page's log says more; what is below is older"
                problem: dict[str, object] = {"id": "problem", "kind": "lines", "title": "Cannot be read now"}
                problem["lines"] = [[text, "failed"]]
                self.take([problem, *self._shown()])
            await asyncio.sleep(max(self._look_seconds, (time.monotonic() - begun) * (1 / MOST_SHARE - 1)))

    def _read_alone(self) -> list[dict[str, object]]:
        # A look whose watchers went goes on in its thread; the next begins after it.
        with self._reading:
            return self._read()

    def _shown(self) -> list[dict[str, object]]:
        """What is shown now, but for the order and an earlier problem."""
        return [json.loads(line) for name, (_, line) in self._parts.items() if name not in ("order", "problem")]
