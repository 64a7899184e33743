"""`metrics.jsonl`: one JSON object per line and event of a run, append-only."""

import fcntl
import json
import math
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

TAIL_BYTES = 1 << 20


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
        event = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "kind": kind, **fields}
        line = json.dumps(_plain(event), allow_nan=False, ensure_ascii=False) + "\n"
        with self.path.open("ab", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # Paths may hold bytes that are no text; as escapes they are JSON all the same.
            file.write(line.encode("utf-8", "backslashreplace"))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All events of a run in order; a torn last line is ignored, a missing file is an empty list.

    Raises:
        json.JSONDecodeError: a line other than the last is damaged.
    """
    if not path.exists():
        return []
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    return [json.loads(line) for line in whole.splitlines() if line]


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
