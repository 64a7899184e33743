"""What each asked node may push, read from the files that the ServerApp writes before it asks.

A JSON line per message: `message`, `node`, `bytes`, `objects`; one file per Flower run, in a folder of the coordinator.
"""

import json
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

MOST_KNOWN = 100_000
"""Questions that are remembered, the newest: 200 sites and 500 rounds."""


@dataclass(frozen=True)
class Allowance:
    """The one answer that a question allows: by which node, how many objects, how many bytes together."""

    node: int
    largest_bytes: int
    most_objects: int


class AllowanceFiles:
    """Allowances by message id; a file is read on from where it ended when an id is not known yet."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._lock = folder, threading.Lock()
        self._read: dict[Path, int] = {}
        self._known: dict[str, Allowance] = {}

    def find(self, message_id: str) -> Allowance | None:
        """The allowance of a question; None when nothing was asked under this id."""
        with self._lock:
            if message_id not in self._known:
                self._read_on()
            return self._known.get(message_id)

    def _read_on(self) -> None:
        for file in sorted(self._folder.glob("*.jsonl")):
            with file.open("rb") as opened:
                opened.seek(self._read.get(file, 0))
                whole, _, _ = opened.read().rpartition(b"\n")
            if not whole:
                continue
            self._read[file] = self._read.get(file, 0) + len(whole) + 1
            for line in whole.splitlines():
                # A line that a kill has torn allows nothing, and the others all the same.
                with suppress(ValueError, TypeError, KeyError, RecursionError):
                    entry = json.loads(line)
                    self._known[entry["message"]] = Allowance(entry["node"], entry["bytes"], entry["objects"])
        for message_id in list(self._known)[: max(0, len(self._known) - MOST_KNOWN)]:
            del self._known[message_id]
