"""What each asked site may send as its answer, written before the question is; the SuperLink's guard reads it.

One file per Flower run in the home's `run/allowances`, mode 0600: a JSON line per message. Without a line nothing that
a site pushes is taken, so a site stores at the SuperLink what it was asked for, once, and nothing else.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from shared.storage.files import append_whole

CHUNK_BYTES = 5 * 2**20
"""Flower cuts arrays into pieces of this size."""
SPARE_OBJECTS = 64
"""Objects of a reply beside its chunks: message, records, arrays."""
FOLDER = Path("run") / "allowances"


class Allowances:
    """The allowances of one Flower run of the coordinator's `home`."""

    def __init__(self, home: Path, run_id: int) -> None:
        self._file = home / FOLDER / f"{run_id}.jsonl"

    def grant(self, messages: Mapping[str, int], largest_bytes: int) -> None:
        """Let each node answer its message, once.

        Args:
            messages: message id to the node that is asked.
            largest_bytes: all objects of an answer together.

        Raises:
            OSError: the disk is full; nothing is granted.
        """
        most = {"bytes": largest_bytes, "objects": largest_bytes // CHUNK_BYTES + SPARE_OBJECTS}
        lines = [json.dumps({"message": message, "node": node, **most}) for message, node in messages.items()]
        self._file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
        try:
            size = os.fstat(descriptor).st_size
            # What a kill has left of a line stays a line of its own.
            torn = b"\n" if size and os.pread(descriptor, 1, size - 1) != b"\n" else b""
            append_whole(descriptor, torn + "".join(f"{line}\n" for line in lines).encode())
        finally:
            os.close(descriptor)
