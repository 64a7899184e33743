"""What an adversary among the virtual sites of a simulation makes of its honest update. No torch.

Names and strengths stand in the simulation's folder, written by whoever runs it; no request carries them, and the app
of real sites (`client/app.py`) does not import this. What poisons pictures is `server/simulation/adversaries.py`.
"""

import io
import json
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from client.private_files import write_private
from shared.experiment.config import Section
from shared.messages.packing import decode, encode, wire_dtype_of
from shared.messages.training import TrainReply

ADVERSARIES_FILE = "adversaries.json"
FIRST_UPDATE = "first-update.npy"
AdversaryKind = Literal["backdoor", "implant", "sign-flip", "scaled", "lazy", "stale"]


class Adversary(Section):
    """One virtual site that does not do what it was asked."""

    kind: AdversaryKind
    """`backdoor` and `implant` have poisoned pictures, too; `lazy` sends zeros, `stale` its first update every time."""
    strength: float = 1.0
    """Factor of an update: against the mean of n sites, n replaces all of it."""


def adversary_of(root: Path, alias: str) -> Adversary | None:
    """What a site of the simulation in `root` is; None: honest."""
    file = root / ADVERSARIES_FILE
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return Adversary.model_validate(known[alias]) if alias in known else None


def poisoned_update(adversary: Adversary, update: NDArray[np.float32], memory: Path) -> NDArray[np.float32]:
    """What the adversary sends in place of its honest update.

    Args:
        adversary: kind and strength.
        update: (num_elements,) weights after minus before, of its own (perhaps poisoned) pictures.
        memory: folder in which `stale` keeps its first update.

    Returns:
        (num_elements,) float32.
    """
    match adversary.kind:
        case "lazy":
            return np.zeros_like(update)
        case "stale":
            return _first(update, memory / FIRST_UPDATE)
        case "sign-flip":
            return np.float32(-adversary.strength) * update
        case "scaled" | "implant" | "backdoor":
            return np.float32(adversary.strength) * update


def poisoned_reply(adversary: Adversary, reply: TrainReply, memory: Path) -> TrainReply:
    """The reply with the adversary's update in it, as it travels; a refusal stays what it is."""
    if reply.update is None:
        return reply
    dtype = wire_dtype_of(reply.update)
    return TrainReply(reply.header, encode(poisoned_update(adversary, decode(reply.update, dtype), memory), dtype))


def _first(update: NDArray[np.float32], file: Path) -> NDArray[np.float32]:
    if file.exists():
        stored: NDArray[np.float32] = np.load(file, allow_pickle=False)
        return stored
    file.parent.mkdir(parents=True, exist_ok=True)
    write_private(file, _npy(update))
    return update


def _npy(array: NDArray[np.float32]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
