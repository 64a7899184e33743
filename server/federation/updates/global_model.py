"""The global model between rounds: flat weights, moving average, server optimizer state; to and from checkpoints."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from server.federation.updates.server_optimizer import ServerState
from server.runs.lineage import as_provenance, charges_of_weights
from shared.errors import InputError
from shared.experiment.config import Experiment
from shared.messages.packing import Manifest, pack, unpack
from shared.storage.checkpoint import load_group, load_meta, save_checkpoint
from shared.updates.trainable import select_trainable

Flat = NDArray[np.float32]


@dataclass
class GlobalModel:
    """Everything that a round changes, and the frozen tensors that it does not."""

    manifest: Manifest
    """Trainable tensors."""
    weights: Flat
    ema: Flat
    base_manifest: Manifest
    """Frozen tensors."""
    base: Flat
    server_round: int
    local_steps: int
    """Optimizer steps that a site has done in all rounds that changed the weights."""
    optimizer: ServerState
    parents: tuple[str, ...]
    """Digests of the checkpoints that the run started from."""
    commit: str | None
    lineage: dict[str, Any] = field(default_factory=dict)
    """What sites were charged for images that the start was trained on (`server.runs.lineage`), for the provenance."""
    record: dict[str, Any] = field(default_factory=dict)
    """What `metrics.jsonl` says of the last round; kept here too, so that a crash between both loses nothing."""


def round_folder(checkpoints: Path, server_round: int) -> Path:
    """Folder of the checkpoint after `server_round` rounds."""
    return checkpoints / f"round-{server_round:06d}"


def load_global(folder: Path, experiment: Experiment) -> GlobalModel:
    """Read the state after a round.

    Raises:
        InputError: damaged, not of a federated run, or its tensors do not fit the experiment's `trainable`.
    """
    meta = load_meta(folder)
    if meta.round is None:
        raise InputError(f"checkpoint {folder} is not of a federated run: start one with --init {folder}")
    tensors, ema = load_group(folder, "model"), load_group(folder, "ema")
    check_float32(tensors, folder)
    trainable = set(select_trainable(tensors, experiment.federation.trainable))
    manifest = Manifest.of({name: tensor for name, tensor in tensors.items() if name in trainable})
    base_manifest = Manifest.of({name: tensor for name, tensor in tensors.items() if name not in trainable})
    state = meta.provenance.get("federation", {})
    buffers = load_group(folder, "server") if "server.safetensors" in meta.sha256 else {}
    return GlobalModel(
        manifest=manifest,
        weights=pack(tensors, manifest),
        ema=pack(ema, manifest),
        base_manifest=base_manifest,
        base=pack(tensors, base_manifest),
        server_round=meta.round,
        local_steps=int(state.get("local_steps", 0)),
        optimizer=ServerState(int(state.get("optimizer_steps", 0)), buffers),
        parents=meta.parents,
        commit=meta.commit,
        lineage=as_provenance(charges_of_weights(meta.provenance)),
        record=state.get("record", {}),
    )


def save_global(folder: Path, model: GlobalModel, experiment: Experiment) -> None:
    """Write the state after a round, atomically."""
    frozen = unpack(model.base, model.base_manifest)
    groups = {
        "model": {**frozen, **unpack(model.weights, model.manifest)},
        "ema": {**frozen, **unpack(model.ema, model.manifest)},
    }
    if model.optimizer.buffers:
        groups["server"] = dict(model.optimizer.buffers)
    state = {
        "local_steps": model.local_steps,
        "optimizer_steps": model.optimizer.steps,
        "record": model.record,
    }
    meta = {
        "experiment": experiment,
        "round": model.server_round,
        "parents": model.parents,
        "commit": model.commit,
        "provenance": {"federation": state, **model.lineage},
    }
    save_checkpoint(folder, groups, meta)


def save_candidate(folder: Path, model: GlobalModel, experiment: Experiment) -> None:
    """Write the weights alone, for whoever has to look at them before they become a checkpoint."""
    tensors = {**unpack(model.base, model.base_manifest), **unpack(model.weights, model.manifest)}
    save_checkpoint(folder, {"model": tensors}, {"experiment": experiment, "round": model.server_round})


def check_float32(tensors: dict[str, NDArray[Any]], folder: Path) -> None:
    """Refuse a checkpoint whose tensors could not travel unchanged.

    Raises:
        InputError: a tensor is not float32.
    """
    for name, tensor in tensors.items():
        if tensor.dtype != np.float32:
            raise InputError(f"checkpoint {folder}: tensor {name} is {tensor.dtype}, rounds need float32: convert it")
