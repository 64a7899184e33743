"""Checkpoint files of other programs as plain tensors by group, whatever their wrappers are called and nested.

Trainers wrap networks (`module.` of DDP, `_orig_mod.` of torch.compile, `_forward_module.` of Fabric), averages keep a
second copy (ema_pytorch's `ema_model.`, torch's `swa`, LitEma's names without points), and files put both below names
of their own. A key is cut into its parts, and leading parts that are wrappers fall away until the network's own name
begins.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from shared.errors import InputError

_WRAPPERS = frozenset(
    {"model", "module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
    | {"state_dict", "model_state_dict", "model_state", "net", "network"}
    | {"nnet", "unet", "generator", "denoise_fn", "denoiser", "diffusion", "diffusion_model", "weights", "params"}
    | {"parameters", "online_model", "raw", "checkpoint", "ckpt", "state", "states", "trainer", "accelerator"}
)
_AVERAGE = re.compile(r"(\w+_)?(ema|swa|averaged|average|polyak|shadow)(_\w+|-?[\d.]+)?|ema_model|averaged_model")
# Copies of the live network inside of an averaging wrapper: `model` has them already, where there is one.
_LIVE_COPY = "online_model"
_NOT_WEIGHTS = re.compile(
    r"opt(imizer)?s?(_states?)?|optim\w*|scaler|grad_scaler|lr_?sched\w*|schedulers?|sched\w*|loops|callbacks"
)
_COUNTERS = frozenset({"initted", "step", "n_averaged", "num_updates", "decay", "global_step"})
_STEPS = ("step", "global_step", "iteration", "iter", "it")
_MAX_DEPTH, _SHOWN_KEYS, _MAX_STEP = 8, 6, 2**53
_PART = re.compile(r"(.+)-\d{5}-of-\d{5}(\.\w+)")
_REFUSED = re.compile(r"Unsupported (?:global|class|operand)[^\n]*?(?= was not|\.? Please|\n|$)|invalid load key[^\n]*")


@dataclass
class ForeignFile:
    """What was found in a file."""

    groups: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """State dicts without wrappers, as `model` and `ema`; a group that is not there is left out."""
    step: int | None = None


def read_foreign(source: Path) -> ForeignFile:
    """Tensors of a file that `torch.save` or safetensors wrote, or of all parts that an `.index.json` names.

    Torch files are read with `weights_only=True`: they may hold tensors and plain containers, nothing that runs.

    Raises:
        InputError: not readable as such a file, one part of several, without tensors (its keys are listed), with a key
            that two parts of the file fill differently, or with an impossible step.
    """
    if part := _PART.fullmatch(source.name):
        index = f"{part[1]}{part[2]}.index.json"
        raise InputError(f"{source}: is one part of a checkpoint: give {index}, which names all of them")
    data = _load_parts(source) if source.name.endswith(".index.json") else _load(source)
    pieces = list(_pieces(data, (), source))
    found = ForeignFile(step=_step(data, source))
    origins: dict[tuple[str, str], str] = {}
    # The live network's own copy goes first, so that a wrapper's copy of it only fills what is missing.
    for path, tensor in sorted(pieces, key=lambda piece: _LIVE_COPY in piece[0]):
        group, name = _place(path)
        whole, state = ".".join(path), found.groups.setdefault(group, {})
        if name in state:
            if _LIVE_COPY not in path and not _is_same(state[name], tensor):
                raise InputError(
                    f"{source}: keys {origins[group, name]!r} and {whole!r} are two different {group} weights: "
                    "keep one of them"
                )
            continue
        state[name], origins[group, name] = tensor, whole
    _restore_points(found.groups)
    found.groups = {group: state for group, state in found.groups.items() if state}
    if not found.groups:
        raise InputError(f"{source}: holds no tensors of a network; it holds {_keys(data)}: give a checkpoint file")
    return found


def _load(source: Path) -> Mapping[str, Any]:
    try:
        is_safe = _is_safetensors(source)
        data: Any = load_file(source) if is_safe else torch.load(source, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"{source}: {error.strerror or error}; give a checkpoint file") from error
    except Exception as error:  # the loaders raise a class of their own for each kind of damage
        raise InputError(f"{source}: no safetensors or plain torch file ({_first_sentence(error)})") from error
    if not isinstance(data, Mapping):
        raise InputError(f"{source}: holds a {type(data).__name__}, not named tensors: give a checkpoint file")
    return data


def _is_safetensors(source: Path) -> bool:
    """By its first bytes: stores of models call the files by their digests, without a suffix."""
    with source.open("rb") as file:
        start = file.read(9)
    return start[8:] == b"{" or source.suffix.lower() == ".safetensors"


def files_of(source: Path) -> list[Path]:
    """Every file that a checkpoint lies in: itself, and the parts that an index names.

    Raises:
        InputError: an index that cannot be read, or names no parts beside it.
    """
    if not source.name.endswith(".index.json"):
        return [source]
    return [source, *(source.parent / file for file in sorted(set(_weight_map(source).values())))]


def _weight_map(index: Path) -> dict[str, str]:
    """File of each tensor."""
    try:
        names: dict[str, str] = json.loads(index.read_text(encoding="utf-8-sig"))["weight_map"]
        files = set(names.values())
        is_plain = bool(files) and all(Path(file).name == file for file in files)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{index}: no index of a checkpoint's parts; give one with a weight_map") from error
    except OSError as error:
        raise InputError(f"{index}: {error.strerror or error}; give a checkpoint file") from error
    if not is_plain:
        raise InputError(f"{index}: names parts that do not lie beside it; put all files into one folder")
    return names


def _load_parts(index: Path) -> dict[str, Any]:
    """The tensors that an index lists, each from the file that it names: another part may hold an older one."""
    names = _weight_map(index)
    parts = {file: _load(index.parent / file) for file in sorted(set(names.values()))}
    if missing := [name for name, file in names.items() if name not in parts[file]]:
        raise InputError(f"{index}: {missing[0]!r} is not in {names[missing[0]]}: give a complete checkpoint")
    if others := [name for part in parts.values() for name in part if name not in names]:
        raise InputError(f"{index}: a part holds {str(others[0])!r}, which it does not list: give its own parts")
    return {name: parts[file][name] for name, file in names.items()}


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same numbers; of those that cannot be compared nobody knows."""
    try:
        return torch.equal(one, other)
    except RuntimeError:  # sparse, without numbers, of another kind
        return False


def _first_sentence(error: Exception) -> str:
    """Of an error text, without control characters of terminals."""
    refused = _REFUSED.search(str(error))
    line = refused[0] if refused else next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    plain = re.sub(r"\x1b\[[0-9;]*[A-Za-z]|[^\x20-\x7e]", "", line)
    return plain if len(plain) <= 120 else plain[:120].rpartition(" ")[0] + " ..."


def _pieces(tree: Mapping[Any, Any], path: tuple[str, ...], source: Path) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """Every tensor with the parts of its whole key, without optimizers and counters."""
    if len(path) > _MAX_DEPTH * 4:
        raise InputError(f"{source}: is nested deeper than any checkpoint: give a checkpoint file")
    for key, value in tree.items():
        parts = tuple(str(key).split("."))
        if _WRAPPERS.issuperset(each.casefold() for each in path) and _NOT_WEIGHTS.fullmatch(parts[0]):
            if average := _average_below(value, parts):
                raise InputError(f"{source}: {average!r} is an average without names: save its state dict by itself")
            continue
        if isinstance(value, Mapping):
            yield from _pieces(value, path + parts, source)
        elif isinstance(value, Tensor) and parts[-1] not in _COUNTERS:
            yield path + parts, value.detach()
        elif isinstance(value, list | tuple) and any(isinstance(each, Tensor) for each in value):
            name = ".".join(path + parts)
            raise InputError(f"{source}: {name!r} is a list of tensors without names: save a state dict of the average")


def _average_below(value: object, path: tuple[str, ...]) -> str | None:
    """Whole key of an average that an optimizer or a callback keeps, if there is one."""
    entries = (
        value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    )
    for key, below in entries:
        here = (*path, str(key))
        if len(here) > _MAX_DEPTH:
            return None
        if _AVERAGE.fullmatch(str(key).casefold()) and _holds_tensors(below):
            return ".".join(here)
        if (found := _average_below(below, here)) is not None:
            return found
    return None


def _holds_tensors(value: object) -> bool:
    if isinstance(value, Mapping):
        value = list(value.values())
    each = value if isinstance(value, list | tuple) else []
    return any(isinstance(one, Tensor) and one.ndim > 0 for one in each)


def _restore_points(groups: dict[str, dict[str, Tensor]]) -> None:
    """Give an average whose names lost their points (LitEma of latent diffusion) those of the live network."""
    whole = {name.replace(".", ""): name for name in groups.get("model", {})}
    average = groups.get("ema", {})
    first = next(iter(average), "")
    # Its wrappers' names stand in front, without points, too.
    for wrapper in sorted(first.removesuffix(name) for name in whole if first.endswith(name)):
        names = {key: whole.get(key.removeprefix(wrapper)) for key in average}
        if len(set(names.values()) - {None}) == len(average):
            groups["ema"] = {name: average[key] for key, name in names.items() if name is not None}
            return


def _place(path: tuple[str, ...]) -> tuple[str, str]:
    """Group of a tensor and its name without wrappers."""
    parts, is_average = list(path), False
    while len(parts) > 1 and (parts[0].casefold() in _WRAPPERS or _AVERAGE.fullmatch(parts[0].casefold())):
        part = parts.pop(0).casefold()
        is_average = part != _LIVE_COPY and (is_average or _AVERAGE.fullmatch(part) is not None)
        # A decay rate in a name, as `ema_0.9999`, was cut at its point.
        if is_average and len(parts) > 1 and parts[0].isdigit():
            parts.pop(0)
    return "ema" if is_average else "model", ".".join(parts)


def _step(data: Mapping[Any, Any], source: Path) -> int | None:
    """Of the file, or below its wrappers."""
    inner = [below for key, below in data.items() if str(key).casefold() in _WRAPPERS and isinstance(below, Mapping)]
    found = [_own_step(data, source), *(_step(below, source) for below in inner)]
    return next((step for step in found if step is not None), None)


def _own_step(data: Mapping[Any, Any], source: Path) -> int | None:
    for name in _STEPS:
        value = data.get(name)
        if isinstance(value, Tensor) and value.numel() == 1 and not (value.is_complex() or value.is_meta):
            value = value.item()
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, int) and not isinstance(value, bool):
            if not 0 <= value < _MAX_STEP:
                shown = value if abs(value) < 2**64 else "beyond 2^64"
                raise InputError(f"{source}: {name} is {shown}, which no training counts: the file is damaged")
            return value
    return None


def _keys(data: Mapping[str, Any]) -> str:
    names = [repr(str(name))[:60] for name in data]
    return ", ".join(names[:_SHOWN_KEYS]) + (", ..." if len(names) > _SHOWN_KEYS else "") if names else "nothing"
