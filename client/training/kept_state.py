"""What stays at this site from round to round: the optimizer's moments, and what 8 bits have lost. No torch.

Both are as private as the images: those of plain rounds are made of gradients without noise. So a file is of one run,
one plan (which fixes mechanism, unit and every constant) and one state of the data set, and any other starts without:
nothing of a plain round can enter a private one. Moments of a private round are made of what its charge has paid for,
and its updates never have 8 bits.

A round starts from the newest state of an earlier round and never from its own, so one that is asked again, whatever
was killed when, has the same start. What cannot be read counts as not there.
"""

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load, save

from client.data.dataset import Dataset
from client.home import Home
from client.private_files import private_files, write_private
from shared.experiment.config import Experiment, Section
from shared.experiment.federation import FederationConfig
from shared.messages.agreement.plan import plan_digest
from shared.messages.packing import Manifest
from shared.messages.training import RequestHeader
from shared.storage.files import canonical_json
from shared.updates.trainable import is_hidden_matrix

MOST_RUNS, MOST_ROUNDS = 4, 2
"""Newest runs that are kept, each with its newest rounds: the one before is what a repeated round starts from."""
LABEL_BYTES = 1024
FIRST, SECOND, MOMENTUM = ".exp_avg", ".exp_avg_sq", ".momentum_buffer"
LOST = "lost"
"""No name of a moment, which ends as one."""
log = logging.getLogger("maskfed.client")
Arrays = dict[str, NDArray[Any]]


class SiteState(NamedTuple):
    """After some round."""

    steps: int
    """Steps that AdamW's moments were gathered in."""
    arrays: Arrays
    """With `keep_moments` `<tensor>.exp_avg` and `<tensor>.exp_avg_sq` of each trained tensor, of Muon's
    `<tensor>.momentum_buffer`; with updates of 8 bits `lost`, (num_elements,), what they have not told so far."""

    @property
    def lost(self) -> NDArray[np.float32] | None:
        """What joins the next update."""
        return self.arrays.get(LOST)


class _Label(Section):
    """First line of a file."""

    key: str
    steps: int = Field(ge=1)
    sha256: str
    """Of all that follows."""


def keeps_state(federation: FederationConfig) -> bool:
    """Whether a run leaves anything at its sites."""
    return federation.keep_moments or federation.wire_dtype == "int8"


class KeptState:
    """That of one run at this site."""

    def __init__(self, home: Home, header: RequestHeader, data: Dataset) -> None:
        """Name the files of a request's run; `data` is what it trains on."""
        self._folder, self._round = home.kept / header.run, header.server_round
        self._shapes = _shapes(header.experiment, header.manifest)
        whose = [header.run, plan_digest(header), data.dataset_id, data.fingerprint]
        self._key = hashlib.sha256(canonical_json(whose)).hexdigest()
        self._is_last = header.server_round >= header.experiment.federation.rounds

    def find(self) -> SiteState | None:
        """The newest of an earlier round, or None: the round then starts without."""
        for path in reversed(self._paths()):
            if path.name < self._path.name and (found := self._read(path)) is not None:
                return found
        return None

    def keep(self, state: SiteState) -> None:
        """Write it after this round (0600); after the last one of the run nobody needs it.

        Raises:
            OSError: the disk is full; nothing half-written is left.
        """
        if self._is_last:
            return
        body = save({name: np.ascontiguousarray(array) for name, array in state.arrays.items()})
        label = _Label(key=self._key, steps=state.steps, sha256=hashlib.sha256(body).hexdigest())
        with private_files():
            self._folder.mkdir(parents=True, exist_ok=True)
        write_private(self._path, label.model_dump_json().encode() + b"\n" + body)
        kept = [path for path in self._paths() if path.name <= self._path.name][-MOST_ROUNDS:]
        # Also what kills in the middle of a write have left; the ledger's lock keeps other writers away.
        for other in self._folder.iterdir():
            if other not in kept:
                other.unlink()
        os.utime(self._folder)
        runs = sorted(self._folder.parent.iterdir(), key=lambda each: each.stat().st_mtime)
        for old in runs[:-MOST_RUNS]:
            shutil.rmtree(old)

    @property
    def _path(self) -> Path:
        return self._folder / f"round-{self._round:09d}"

    def _paths(self) -> list[Path]:
        return sorted(self._folder.glob("round-*"))

    def _read(self, path: Path) -> SiteState | None:
        try:
            with path.open("rb") as file:
                head, body = file.readline(LABEL_BYTES), file.read()
            label = _Label.model_validate(json.loads(head))
            is_whole = label.sha256 == hashlib.sha256(body).hexdigest()
            arrays = load(body) if is_whole and label.key == self._key else {}
        except (OSError, ValueError, ValidationError, SafetensorError, RecursionError):
            is_whole, arrays = False, {}
        if not is_whole:
            log.warning("%s cannot be read or is damaged, and is not used", path)
            return None
        if not _fit(arrays, self._shapes):
            log.info("the state in %s is of another plan or data set and not used", path.name)
            return None
        return SiteState(label.steps, arrays)


def _shapes(experiment: Experiment, manifest: Manifest) -> dict[str, tuple[int, ...]]:
    """Of all arrays that a round of a run leaves."""
    federation = experiment.federation
    shapes: dict[str, tuple[int, ...]] = {}
    for tensor in manifest.tensors if federation.keep_moments else ():
        is_muons = experiment.optim.optimizer == "muon" and is_hidden_matrix(tensor.name, tensor.shape)
        shapes |= {f"{tensor.name}{end}": tensor.shape for end in ((MOMENTUM,) if is_muons else (FIRST, SECOND))}
    return shapes | ({LOST: (manifest.num_elements,)} if federation.wire_dtype == "int8" else {})


def _fit(arrays: Arrays, shapes: dict[str, tuple[int, ...]]) -> bool:
    """Whether these are arrays of exactly these shapes, and numbers that such arrays can hold."""
    if {name: array.shape for name, array in arrays.items()} != shapes:
        return False
    if any(array.dtype != np.float32 or not np.isfinite(array).all() for array in arrays.values()):
        return False
    return all(float(array.min(initial=0.0)) >= 0 for name, array in arrays.items() if name.endswith(SECOND))
