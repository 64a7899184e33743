"""A checkpoint as a folder that `diffusers.DiffusionPipeline.from_pretrained` loads, and back. diffusers is not needed.

```
model_index.json        which classes, the forward process, how the owner samples
maskfed_pipeline.py     schedule and samplers (`diffusers_code`)
network/                maskfed_network.py, config.json, diffusion_pytorch_model.safetensors
experiment.toml         the experiment that the weights come from
README.md               how to load it
```
"""

import json
import os
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from server.training.foreign.diffusers_code import NETWORK_MODULE, PIPELINE_MODULE, network_code, pipeline_code
from server.training.foreign.tensors import dense_numbers
from shared.diffusion.unet import WIDTHS
from shared.diffusion.uvit import UViT, build_model
from shared.errors import InputError
from shared.evaluation.generate import LoadedModel, load_model
from shared.experiment.config import Experiment, load_experiment
from shared.storage.checkpoint import resolve_checkpoint, save_checkpoint
from shared.storage.files import TEMPORARY_PREFIX, file_digest, machine_errors, sync_file

INDEX_FILE, EXPERIMENT_FILE, WEIGHTS_FILE = "model_index.json", "experiment.toml", "diffusion_pytorch_model.safetensors"
DIFFUSERS_VERSION = "0.32.0"
"""The oldest that the folder is meant for."""
_SAMPLING = ("sampler", "steps", "eta", "clip_x_0", "rederive_eps", "ddim_grid")
_PREFIX, _NETWORK = "network.", "network"


def export_folder(checkpoint: Path, out: Path) -> None:
    """Write the averaged weights of a checkpoint (folder, or run directory) as a folder for diffusers.

    Raises:
        InputError: no such checkpoint, none with averaged weights, or `out` exists.
    """
    if out.exists() or out.is_symlink():
        raise InputError(f"{out} exists already: give a new folder")
    loaded = load_model(resolve_checkpoint(checkpoint))
    temporary = out.with_name(f"{TEMPORARY_PREFIX}{out.name}-{os.getpid()}")
    try:
        with machine_errors(out):
            (temporary / _NETWORK).mkdir(parents=True)
            _write(loaded, temporary)
            temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def is_folder(path: Path) -> bool:
    """Whether it is a folder for diffusers."""
    return (path / INDEX_FILE).is_file()


def import_folder(source: Path, out: Path, *, takes_all: bool = True) -> Experiment:
    """Turn a folder that `export_folder` wrote into a checkpoint of ours; none of its Python files is run.

    Args:
        source: the folder.
        out: the checkpoint folder to write.
        takes_all: false where the user says schedule or heads, which this folder says itself.

    Returns:
        The experiment that describes the network.

    Raises:
        InputError: not such a folder, a damaged one, weights that do not fit its experiment, or `out` exists.
    """
    if out.exists():
        raise InputError(f"{out} exists already: give a new folder")
    if not takes_all:
        raise InputError(f"{source} says its schedule and heads itself: leave out --schedule and --heads")
    weights = source / _NETWORK / WEIGHTS_FILE
    if not (source / EXPERIMENT_FILE).is_file() or not weights.is_file():
        raise InputError(
            f"{source}: no {EXPERIMENT_FILE} with {_NETWORK}/{WEIGHTS_FILE}: give a folder that "
            "`maskfed-server export --to diffusers` wrote"
        )
    experiment = load_experiment(source / EXPERIMENT_FILE)
    tensors = {name: tensor.numpy() for name, tensor in _fitting(weights, experiment).items()}
    provenance = {"imported_from": source.name, "sha256": file_digest(weights), "layout": "diffusers"}
    save_checkpoint(out, {"model": tensors, "ema": tensors}, {"experiment": experiment, "provenance": provenance})
    return experiment


def _write(loaded: LoadedModel, folder: Path) -> None:
    tensors = {f"{_PREFIX}{name}": tensor.contiguous() for name, tensor in loaded.model.state_dict().items()}
    save_file(tensors, folder / _NETWORK / WEIGHTS_FILE, metadata={"format": "pt"})
    files = {
        INDEX_FILE: _json(_index(loaded)),
        f"{PIPELINE_MODULE}.py": pipeline_code(),
        f"{_NETWORK}/{NETWORK_MODULE}.py": network_code(),
        f"{_NETWORK}/config.json": _json(_network_config(loaded)),
        EXPERIMENT_FILE: loaded.experiment.to_toml(),
        "README.md": _read_me(loaded),
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
        sync_file(folder / name)
    sync_file(folder / _NETWORK / WEIGHTS_FILE)


def _index(loaded: LoadedModel) -> dict[str, Any]:
    experiment = loaded.experiment
    options, diffusion = experiment.evaluation, experiment.diffusion
    return {
        "_class_name": [PIPELINE_MODULE, "MaskfedPipeline"],
        "_diffusers_version": DIFFUSERS_VERSION,
        _NETWORK: [NETWORK_MODULE, "MaskfedNetwork"],
        **{name: getattr(diffusion, name) for name in ("schedule", "timesteps", "prediction")},
        **{name: getattr(experiment.data, name) for name in ("wavelet", "wavelet_tokens")},
        **{name: getattr(options, name) for name in _SAMPLING},
        "model": loaded.meta.digest,
    }


def _network_config(loaded: LoadedModel) -> dict[str, Any]:
    experiment, network = loaded.experiment, loaded.model
    model = experiment.model
    facts = {
        "_class_name": "MaskfedNetwork",
        "_diffusers_version": DIFFUSERS_VERSION,
        "backbone": model.backbone,
        "in_channels": experiment.in_channels,
        "grid_size": experiment.grid_size,
        "patch_size": model.patch_size,
        "sequences": list(experiment.sequences),
    }
    if not isinstance(network, UViT):
        return {**facts, "widths": WIDTHS[model.size]}
    heads = network.mid_block.attention.num_heads
    blocks = 2 * len(network.in_blocks) + 1
    return {
        **facts,
        "width": network.width,
        "num_blocks": blocks,
        "num_heads": heads,
        "qkv_bias": model.qkv_bias,
    }


def _read_me(loaded: LoadedModel) -> str:
    template = (Path(__file__).parent / "templates" / "README.md.txt").read_text(encoding="utf-8")
    packages = "torch einops PyWavelets" if loaded.experiment.data.wavelet else "torch einops"
    facts = {"version": version("maskfed"), "weights": "averaged", "digest": loaded.meta.digest, "packages": packages}
    return template.format(**facts)


def _json(tree: dict[str, Any]) -> str:
    return json.dumps(tree, indent=2) + "\n"


def _fitting(weights: Path, experiment: Experiment) -> dict[str, Tensor]:
    """The tensors of a file, if they are exactly those of the experiment's network."""
    try:
        with machine_errors(weights):
            found = load_file(weights)
    except (SafetensorError, ValueError, KeyError) as error:
        raise InputError(f"{weights}: not a safetensors file ({error})") from error
    wanted = _shapes(experiment)
    named = {name.removeprefix(_PREFIX): tensor for name, tensor in found.items() if name.startswith(_PREFIX)}
    if odd := sorted(wanted.keys() ^ named.keys()) or sorted(found.keys() - {_PREFIX + name for name in named}):
        raise InputError(f"{weights}: key {odd[0]!r} is missing or does not belong to the network of {EXPERIMENT_FILE}")
    for name, tensor in named.items():
        if tensor.shape != wanted[name]:
            fits = tuple(wanted[name])
            raise InputError(f"{weights}: key {name!r} has shape {tuple(tensor.shape)}, {fits} would fit")
    return {name: dense_numbers(name, tensor) for name, tensor in named.items()}


def _shapes(experiment: Experiment) -> dict[str, torch.Size]:
    with torch.device("meta"):
        network: nn.Module = build_model(experiment)
    return {name: tensor.shape for name, tensor in network.state_dict().items()}
