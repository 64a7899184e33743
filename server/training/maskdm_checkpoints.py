"""Import and export of the authors' MaskDM checkpoints and of U-ViT's; `maskdm_layouts` says what is called how."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from server.training import maskdm_layouts
from server.training.maskdm_layouts import Layout, ScheduleKind
from shared.errors import InputError
from shared.experiment.config import Experiment
from shared.storage.checkpoint import load_group, load_meta, resolve_checkpoint, save_checkpoint
from shared.storage.files import TEMPORARY_PREFIX, file_digest, sync_file


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
    groups, step = read_foreign(source)
    betas = next((state["betas"] for state in groups.values() if "betas" in state), None)
    tables = maskdm_layouts.schedule_tables("linear", 2).keys()
    states = {name: {k: x for k, x in state.items() if k not in tables} for name, state in groups.items()}
    first = next(iter(states.values()))
    layout = maskdm_layouts.find_layout(first)
    experiment = maskdm_layouts.describe(first, layout, schedule or maskdm_layouts.schedule_of(betas), num_heads)
    model = maskdm_layouts.meta_model(experiment)
    ours = {name: _to_numpy(maskdm_layouts.from_foreign(state, layout, model)) for name, state in states.items()}
    ours = {"model": ours.get("model") or ours["ema"], "ema": ours.get("ema") or ours["model"]}
    provenance = {"imported_from": source.name, "sha256": file_digest(source), "layout": layout}
    save_checkpoint(out, ours, {"experiment": experiment, "step": step, "provenance": provenance})
    return experiment


def export_checkpoint(checkpoint: Path, target: Path, layout: Layout) -> None:
    """Write a checkpoint (folder, or run directory) in a foreign layout, as `.safetensors`, `.pt` or `.pth`.

    `maskdm` holds `model.*` and `ema_model.model.*` with the schedule's tables, which the authors' evaluation relies
    on; as a torch file it is the nested training state that they load. `uvit` holds the bare averaged weights.

    Raises:
        InputError: no such checkpoint, a U-Net, a file that exists, or another suffix.
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
    patch_size = meta.experiment.model.patch_size
    states = {
        group: maskdm_layouts.to_foreign(
            {key: torch.from_numpy(x) for key, x in load_group(folder, group).items()}, layout, patch_size
        )
        for group in ("model", "ema")
    }
    if layout == "uvit":
        _write(states["ema"], target)
        return
    diffusion = meta.experiment.diffusion
    tables = maskdm_layouts.schedule_tables(diffusion.schedule, diffusion.timesteps)
    online = {**tables, **{f"model.{key}": tensor for key, tensor in states["model"].items()}}
    averaged = {f"ema_model.{key}": tensor.clone() for key, tensor in tables.items()}
    averaged |= {f"ema_model.model.{key}": tensor for key, tensor in states["ema"].items()}
    nested = target.suffix != ".safetensors"
    _write({"step": meta.step or 0, "model": online, "ema": averaged} if nested else {**online, **averaged}, target)


def read_foreign(source: Path) -> tuple[dict[str, dict[str, Tensor]], int | None]:
    """State dicts by group (`model`, `ema`) without their wrappers' prefixes, and the step where the file tells it.

    Torch files are read with `weights_only=True`: they may hold tensors and plain containers, nothing that runs.

    Raises:
        InputError: not readable as such a file, or without tensors.
    """
    try:
        is_safe = source.suffix == ".safetensors"
        data: Any = load_file(source) if is_safe else torch.load(source, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"{source}: {error.strerror or error}; give a checkpoint file") from error
    except Exception as error:  # the loaders raise a class of their own for each kind of damage
        reason = str(error).strip().splitlines()[:1]
        raise InputError(f"{source}: no safetensors or plain torch file ({' '.join(reason)[:120]})") from error
    data = dict(data) if isinstance(data, Mapping) else {}
    nested = {name: data[name] for name in ("model", "ema") if isinstance(data.get(name), Mapping)}
    flat = {key: value for part in (nested or {"": data}).values() for key, value in part.items()}
    groups: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}}
    for key, value in flat.items():
        is_average = key.startswith("ema_model.")
        # The averaging wrapper also stores the live model and two counters; the live one is in `model` already.
        if isinstance(value, Tensor) and not key.startswith("online_model.") and key not in ("initted", "step"):
            groups["ema" if is_average else "model"][_bare(key)] = value
    step = data.get("step")
    if not (groups["model"] or groups["ema"]):
        raise InputError(f"{source}: holds no tensors under model.* or ema_model.*: give a checkpoint file")
    return {name: state for name, state in groups.items() if state}, step if isinstance(step, int) else None


def _bare(key: str) -> str:
    for prefix in ("ema_model.", "module.", "model."):
        key = key.removeprefix(prefix)
    return key


def _write(content: dict[str, Any], target: Path) -> None:
    temporary = target.with_name(f"{TEMPORARY_PREFIX}{target.name}")
    if target.suffix == ".safetensors":
        save_file(content, temporary)
    else:
        torch.save(content, temporary)
    sync_file(temporary)
    temporary.rename(target)


def _to_numpy(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.contiguous().numpy() for name, tensor in tensors.items()}
