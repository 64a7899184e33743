"""A round's updates on the coordinator's disk until the round is accepted, so that a jump can be traced to a site.

As large as what travelled: sites x 4 bytes per trained number (2 as bfloat16), in a folder of mode 0700; nothing of it
is in memory. Under client-level DP nothing is kept: which site it was would be told without noise. Masked
updates say nothing.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from server.federation.updates.aggregation import FixedPointSum
from shared.storage.files import write_atomically
from shared.updates.wire_sizes import WireDtype

INDEX_FILE = "replies.json"


@dataclass(frozen=True)
class Reply:
    """One reply as it was folded."""

    site: str
    weight: int
    factor: float
    """What the norm bound made of it."""


class KeptReplies:
    """The updates of one round, by site."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._replies: dict[str, Reply] = {}

    def keep(self, reply: Reply, wire: NDArray[Any]) -> None:
        """Write a good update; the index follows with `close`."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        np.save(self._file(len(self._replies)), wire, allow_pickle=False)
        self._replies[reply.site] = reply

    def close(self) -> None:
        """Write down whose files these are, in the order of the files."""
        if self._replies:
            text = json.dumps([asdict(reply) for reply in self._replies.values()])
            write_atomically(self.folder / INDEX_FILE, text + "\n")

    def clear(self) -> None:
        """Delete all of them."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._replies = {}

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:06d}.npy"


class StoredReplies:
    """The same, read by the process of the check."""

    def __init__(self, folder: Path, dtype: WireDtype) -> None:
        self.folder, self.dtype = folder, dtype
        index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
        self.files = {entry["site"]: folder / f"{number:06d}.npy" for number, entry in enumerate(index)}
        self.replies = [Reply(**entry) for entry in index]

    def total(self, num_elements: int) -> FixedPointSum:
        """The round's sum again."""
        total = FixedPointSum(num_elements)
        for reply in self.replies:
            total.fold(self._wire(reply), self.dtype, reply.weight, reply.factor)
        return total

    @contextmanager
    def without(self, total: FixedPointSum, reply: Reply) -> Iterator[None]:
        """`total` lacks this reply inside the block."""
        self.take_out(total, reply)
        yield
        total.fold(self._wire(reply), self.dtype, reply.weight, reply.factor)

    def take_out(self, total: FixedPointSum, reply: Reply) -> None:
        """Leave this reply out of `total` for good."""
        total.take_out(self._wire(reply), self.dtype, reply.weight, reply.factor)

    def _wire(self, reply: Reply) -> NDArray[Any]:
        wire: NDArray[Any] = np.load(self.files[reply.site], allow_pickle=False)
        return wire
