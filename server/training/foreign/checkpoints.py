"""Import and export of the authors' MaskDM checkpoints and of U-ViT's; `names` says what is called how."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from server.training.foreign import layouts
from server.training.foreign.names import Layout
from server.training.foreign.schedules import ScheduleKind, diffusion_of, schedule_tables
from server.training.foreign.tensors import dense_numbers
from server.training.foreign.wrapped_files import files_of, read_foreign
from shared.errors import InputError
from shared.experiment.config import Experiment
from shared.storage.checkpoint import load_group, load_meta, resolve_checkpoint, save_checkpoint
from shared.storage.files import TEMPORARY_PREFIX, file_digest, machine_errors, sync_file


def import_checkpoint(
    source: Path, out: Path, *, schedule: ScheduleKind | None = None, num_heads: int | None = None
) -> Experiment:
    """Turn a foreign file (`torch.save` or safetensors) into a checkpoint folder of ours.

    Args:
        source: whole MaskDM training states, or bare state dicts of either project. A file with averaged weights gives
            both groups, one without gives the same weights twice.
        out: the checkpoint folder to write.
        schedule: noise schedule the weights were trained with; None reads it from MaskDM's stored tables.
        num_heads: heads per block; shapes do not show them, so None trusts the size's own number.

    Returns:
        The experiment that describes the imported network.

    Raises:
        InputError: unreadable, of neither layout, or with a key that has no place here; the line names the key.
    """
    if out.exists():
        raise InputError(f"{out} exists already: give a new folder")
    found = read_foreign(source)
    tables, states = _apart(found.groups)
    states = {group: layouts.whole_biases(state) for group, state in states.items()}
    first = next(iter(states.values()))
    layout = layouts.find_layout(first)
    diffusion = diffusion_of(tables, schedule)
    experiment = layouts.describe(first, layout, diffusion, num_heads)
    model = layouts.meta_model(experiment)
    ours = {name: _to_numpy(layouts.from_foreign(state, layout, model)) for name, state in states.items()}
    ours = {"model": ours.get("model") or ours["ema"], "ema": ours.get("ema") or ours["model"]}
    provenance = {"imported_from": source.name, "sha256": _digest(source), "layout": layout}
    save_checkpoint(out, ours, {"experiment": experiment, "step": found.step, "provenance": provenance})
    return experiment


def export_checkpoint(checkpoint: Path, target: Path, layout: Literal["maskdm", "uvit"]) -> None:
    """Write a checkpoint (folder, or run directory) in a foreign layout, as `.safetensors`, `.pt` or `.pth`.

    `maskdm` holds `model.*` and `ema_model.model.*` with the schedule's tables, which the authors' evaluation relies
    on; as a torch file it is the nested training state that they load. `uvit` holds the bare averaged weights.

    Raises:
        InputError: no such checkpoint, a U-Net, two sequences of tokens for U-ViT, a file that exists, or another
            suffix.
    """
    if target.suffix not in (".safetensors", ".pt", ".pth"):
        raise InputError(f"{target.name}: suffix {target.suffix!r}: give .safetensors, .pt or .pth")
    if target.exists():
        raise InputError(f"{target} exists already: give a new name")
    folder = resolve_checkpoint(checkpoint)
    meta = load_meta(folder)
    if meta.experiment.model.backbone != "uvit":
        raise InputError(
            f"checkpoint {folder} has backbone {meta.experiment.model.backbone!r}: only uvit has this layout"
        )
    is_split = meta.experiment.data.wavelet_tokens == "split"
    if is_split and layout == "uvit":
        raise InputError(
            f"checkpoint {folder} has data.wavelet_tokens 'split', U-ViT one sequence of tokens: give --to maskdm"
        )
    named: Layout = "maskdm-dwt" if is_split else layout
    patch_size = meta.experiment.model.patch_size
    states = {
        group: layouts.to_foreign(
            {key: torch.from_numpy(x) for key, x in load_group(folder, group).items()}, named, patch_size
        )
        for group in ("model", "ema")
    }
    if layout == "uvit":
        _write(states["ema"], target)
        return
    diffusion = meta.experiment.diffusion
    tables = schedule_tables(diffusion.schedule, diffusion.timesteps)
    online = {**tables, **{f"model.{key}": tensor for key, tensor in states["model"].items()}}
    averaged = {f"ema_model.{key}": tensor.clone() for key, tensor in tables.items()}
    averaged |= {f"ema_model.model.{key}": tensor for key, tensor in states["ema"].items()}
    nested = target.suffix != ".safetensors"
    _write({"step": meta.step or 0, "model": online, "ema": averaged} if nested else {**online, **averaged}, target)


def _digest(source: Path) -> str:
    """SHA-256 of the file; of one in parts, that of the digests of index and parts in order."""
    digests = [file_digest(file) for file in files_of(source)]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _apart(groups: dict[str, dict[str, Tensor]]) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """The schedule's tables, which all groups of a file must agree on, and the groups without them.

    Raises:
        InputError: tables that are no plain numbers, two groups with different ones, or none with weights.
    """
    names = schedule_tables("linear", 1000).keys()
    tables: dict[str, Tensor] = {}
    for state in groups.values():
        for name in names & state.keys():
            table = dense_numbers(name, state[name])
            if not torch.equal(tables.setdefault(name, table), table):
                raise InputError(f"key {name!r}: the live network and its average have different schedules: damaged")
    states = {group: {k: x for k, x in state.items() if k not in names} for group, state in groups.items()}
    states = {group: state for group, state in states.items() if state}
    if not states:
        raise InputError(f"key {min(tables)!r}: the file holds a schedule and no weights: give a checkpoint file")
    return tables, states


def _write(content: dict[str, Any], target: Path) -> None:
    temporary = target.with_name(f"{TEMPORARY_PREFIX}{target.name}-{os.getpid()}")
    try:
        with machine_errors(target):
            if target.suffix == ".safetensors":
                save_file(content, temporary)
            else:
                torch.save(content, temporary)
        sync_file(temporary)
        temporary.rename(target)
    finally:
        temporary.unlink(missing_ok=True)


def _to_numpy(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.contiguous().numpy() for name, tensor in tensors.items()}
