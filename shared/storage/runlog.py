"""`metrics.jsonl`: one JSON object per line and event of a run, append-only.

The log tells; nothing rests on it. A line that a power cut or another program has damaged is skipped, counted and
named, and what a run needs to go on is in its checkpoints.
"""

import copy
import fcntl
import json
import logging
import math
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from shared.storage.files import append_whole

TAIL_BYTES = 1 << 20
SHOWN_LINES = 10
"""Damaged lines that a warning names by number."""
Outcome = Literal["answered", "refused", "failed", "late", "rejected", "lost"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
"""How a site's part in a round can end; each is a list in the round's record."""
_NEEDED: Any = ...
_FIELDS: dict[str, dict[str, tuple[tuple[type, ...], Any]]] = {
    "round": {
        "round": ((int,), _NEEDED),
        **{name: ((list,), []) for name in ("asked", *OUTCOMES)},
        "bytes_sent": ((int,), 0),
        "bytes_received": ((int,), 0),
        "weights_changed": ((bool,), True),
        "update_norm": ((int, float), 0.0),
        "seconds": ((dict,), {}),
    },
    "round_failed": {"round": ((int,), _NEEDED)},
    "evaluation": {"round": ((int, type(None)), None), "metrics": ((dict,), {})},
    "train": {"step": ((int,), _NEEDED)},
    "offer": {
        **dict.fromkeys(("site", "status"), ((str,), _NEEDED)),
        "reason": ((str,), ""),
        "unit": ((str, type(None)), None),
        **dict.fromkeys(
            ("epsilon_mean_image", "epsilon_round", "epsilon_run", "epsilon_cap", "delta"),
            ((int, float, type(None)), None),
        ),
    },
}
"""Types of what readers use of an event, by kind, and what stands in for a field that is not there."""
log = logging.getLogger("maskfed.server")


class RunLog:
    """Appends events to a file; several processes may write the same one.

    A last line without newline is what a kill in the middle of a write leaves. It is cut off when the next writer
    opens the file, so that it never ends up in the middle.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            _cut_torn_line(file.fileno(), path)

    def write(self, kind: str, **fields: object) -> None:
        """Append `{"time": ISO 8601 UTC, "kind": kind, **fields}` as one line and flush it.

        Numbers that JSON does not have (nan, inf) become null; numpy scalars become numbers, paths strings.
        """
        self._append(kind, fields, is_durable=False)

    def write_durably(self, kind: str, **fields: object) -> None:
        """As `write`, and on disk when it returns: for what happens once per round."""
        self._append(kind, fields, is_durable=True)

    def _append(self, kind: str, fields: Mapping[str, object], *, is_durable: bool) -> None:
        event = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "kind": kind, **fields}
        line = json.dumps(_plain(event), allow_nan=False, ensure_ascii=False) + "\n"
        with self.path.open("ab", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # Paths may hold bytes that are no text; as escapes they are JSON all the same.
            append_whole(file.fileno(), line.encode("utf-8", "backslashreplace"), is_durable=is_durable)


class RunLogReader:
    """Reads a log that grows: each call parses only the lines that are new."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_files = 0
        """How many files have stood in this place: a reader that adds up begins anew when this changes."""
        self.unread_bytes = 0
        """What the last call has left."""
        self._begin()

    @property
    def read_bytes(self) -> int:
        """How far this file has been read."""
        return self._offset

    def _begin(self) -> None:
        self.num_files += 1
        self.events: list[dict[str, Any]] = []
        self.damaged: list[int] = []
        """Numbers of the lines that were skipped, from 1."""
        self._offset = self._num_lines = 0

    def read(self) -> list[dict[str, Any]]:
        """All events so far, in order; a torn last line waits for its end, a missing file has none."""
        new = self.read_new()
        self.events += new
        return self.events

    def read_new(self, most_bytes: int = -1) -> list[dict[str, Any]]:
        """Events that no call has returned yet; none of them is kept here, so memory does not grow with the log.

        Args:
            most_bytes: read about so much, at least one line; -1: everything.
        """
        try:
            with self.path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size < self._offset:
                    self._begin()  # somebody has put another file in its place
                file.seek(self._offset)
                new, newline, rest = file.read(most_bytes).rpartition(b"\n")
                if not newline and 0 <= most_bytes <= len(rest):
                    line = rest + file.readline()
                    new, newline, _ = line.rpartition(b"\n")
        except FileNotFoundError:
            return []
        self._offset += len(new) + len(newline)
        self.unread_bytes = size - self._offset
        found = []
        for line in new.split(b"\n") if newline else []:
            self._num_lines += 1
            if event := self._take(line):
                found.append(event)
        return found

    def _take(self, line: bytes) -> dict[str, Any] | None:
        event = _event(line) if line else None
        if line and event is None:
            self.damaged.append(self._num_lines)
        return event


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All events of a run in order; damaged lines are skipped with a warning, a missing file is an empty list.

    Every event has a text `kind` and `time`, and the fields of its kind that readers use.
    """
    reader = RunLogReader(path)
    events = reader.read()
    if reader.damaged:
        log.warning("%s: %s", path, damage_text(reader.damaged))
    return events


def damage_text(damaged: list[int]) -> str:
    """One line about skipped lines: how many, and which."""
    numbers = ", ".join(map(str, damaged[:SHOWN_LINES]))
    further = f" and {len(damaged) - SHOWN_LINES} more" if len(damaged) > SHOWN_LINES else ""
    return f"{len(damaged)} damaged lines skipped ({numbers}{further})"


def _event(line: bytes) -> dict[str, Any] | None:
    """The event of a line; None where it is damaged."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(event, dict) or not isinstance(event.get("kind"), str):
        return None
    return _whole(event)


def _whole(event: dict[str, Any]) -> dict[str, Any] | None:
    """An event with all the fields that readers use; None where one is missing or has another type."""
    whole = {"time": "", **event}
    for name, (kinds, default) in {"time": ((str,), ""), **_FIELDS.get(event["kind"], {})}.items():
        value = whole.setdefault(name, copy.copy(default))
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            return None
        if isinstance(value, list) and not all(isinstance(site, dict) and "site" in site for site in value):
            return None
    return whole


def _cut_torn_line(descriptor: int, path: Path) -> None:
    size = os.fstat(descriptor).st_size
    tail = os.pread(descriptor, TAIL_BYTES, max(0, size - TAIL_BYTES))
    if tail and not tail.endswith(b"\n"):
        os.truncate(path, size - len(tail) + tail.rfind(b"\n") + 1)


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
