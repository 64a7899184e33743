"""The sum of a round's masked updates, in the ring, and the shares that came with them; on disk before it is unmasked.

Once sites have been told who is in the sum they answer for this list alone, so a process that dies must not come to
another list: the sum is taken up again as it was.
"""

import json
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from server.federation.updates.aggregation import UpdateError
from shared.messages.training import RequestHeader
from shared.secure_aggregation.dealing import Dealing
from shared.secure_aggregation.ring import Ring, ring_of
from shared.secure_aggregation.roster import Roster
from shared.storage.files import machine_errors, write_atomically
from shared.updates.fixed_point import CHUNK_ELEMENTS

ROUND_FILE, SUM_FILE = "round.json", "{}.npy"
log = logging.getLogger("maskfed.server")


class MaskedSum:
    """One round's: as many bytes as one masked update, whatever the number of sites."""

    def __init__(self, ring: Ring, roster: Roster, num_elements: int) -> None:
        self.ring, self.roster = ring, roster
        self.elements: NDArray[Any] = np.zeros(num_elements, ring.dtype)
        self.dealings: dict[str, Dealing] = {}

    @classmethod
    def of(cls, header: RequestHeader, roster: Roster) -> "MaskedSum":
        """The empty sum of the round that `header` asks for."""
        return cls(ring_of(header.experiment, len(roster.members)), roster, header.manifest.num_elements)

    def fold(self, site: str, update: NDArray[Any], dealing: Dealing | None) -> None:
        """Add a masked update; nothing of it can be checked but its form.

        Raises:
            UpdateError: `dtype`, `length`, or `dealing`: shares for another number of sites, or none.
        """
        if update.dtype != self.ring.dtype:
            raise UpdateError("dtype", f"a masked update of {update.dtype}, agreed was {self.ring.dtype}")
        if update.shape != self.elements.shape:
            raise UpdateError("length", f"update has shape {update.shape}, agreed was {self.elements.shape}")
        if dealing is None or len(dealing.boxes) != len(self.roster.members):
            raise UpdateError("dealing", f"a masked update without shares for all {len(self.roster.members)} sites")
        for start in range(0, len(update), CHUNK_ELEMENTS):
            part = self.elements[start : start + CHUNK_ELEMENTS]
            np.add(part, update[start : start + CHUNK_ELEMENTS], out=part)
        self.dealings[site] = dealing


@dataclass(frozen=True)
class KeptRound:
    """A round whose updates are added up, as it lies on disk."""

    elements: NDArray[Any]
    dealings: dict[str, Dealing]
    outcomes: list[dict[str, Any]] = field(default_factory=list)
    """What became of each site that was asked."""
    bytes_received: int = 0


class KeptSum:
    """The newest masked sum of a run, in a folder of mode 0700."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def keep(self, request_digest: str, kept: KeptRound) -> None:
        """Durable when this returns; the sum first, so that what names it finds it."""
        self._folder.mkdir(mode=0o700, exist_ok=True)
        _save(self._folder / SUM_FILE.format(request_digest), kept.elements)
        told = {
            "request_digest": request_digest,
            "dealings": {site: dealing.model_dump(mode="json") for site, dealing in kept.dealings.items()},
            "outcomes": kept.outcomes,
            "bytes_received": kept.bytes_received,
        }
        write_atomically(self._folder / ROUND_FILE, json.dumps(told) + "\n")

    def find(self, request_digest: str, total: MaskedSum) -> KeptRound | None:
        """The round of this very request; None where its updates were not added up yet, or a file is damaged.

        Args:
            request_digest: of the training request.
            total: of the same round, still empty.
        """
        try:
            told = json.loads((self._folder / ROUND_FILE).read_bytes())
            if told["request_digest"] != request_digest:
                return None
            elements = np.load(self._folder / SUM_FILE.format(request_digest), allow_pickle=False)
            dealings = {site: Dealing.model_validate(each) for site, each in told["dealings"].items()}
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, ValidationError):
            log.warning("%s is damaged: the updates are asked for again", self._folder / ROUND_FILE)
            return None
        if elements.shape != total.elements.shape or elements.dtype != total.elements.dtype:
            return None
        return KeptRound(elements, dealings, told["outcomes"], told["bytes_received"])

    def clear(self) -> None:
        """Delete it once its round has a checkpoint."""
        (self._folder / ROUND_FILE).unlink(missing_ok=True)
        for old in self._folder.glob(SUM_FILE.format("*") + "*"):
            old.unlink()


def _save(path: Path, elements: NDArray[Any]) -> None:
    """As `write_atomically`, without a second copy of the sum in memory."""
    partial = path.with_name(f"{path.name}.partial")
    with machine_errors(partial), partial.open("wb") as file:
        np.save(file, elements, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
