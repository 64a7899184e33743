"""Key names and shapes of the authors' MaskDM code and of U-ViT, against ours.

The networks are the same functions. They differ in names, in the patch embeddings (their convolution with stride equal
to its kernel is our linear layer on flattened patches), in a leading axis of 1 on the positions, and in the attention's
bias: MaskDM has one of query and one of value, and ours of the key is 0 then. A bias of the key adds the same number to
all scores of a query, so no attention depends on it. Patch values leave the last layers in the same order (row, column,
channel) everywhere.
"""

import math
from collections.abc import Mapping

import torch
from pydantic import ValidationError
from torch import Tensor

from server.training.foreign.names import OUTPUT, POSITIONS, PREFIX, Layout, foreign_name
from server.training.foreign.schedules import Diffusion
from server.training.foreign.tensors import dense_numbers
from shared.diffusion.uvit import SIZES, UViT, build_model
from shared.errors import InputError
from shared.experiment.config import Experiment, explain
from shared.experiment.sections import EvaluationConfig

_KERNELS = ("embedding.weight", "detail_embedding.weight")
"""Convolutions in the other projects."""
_REASONS = {
    "final_layer": "a final convolution, and this network ends in one linear layer",
    "time_embed": "a perceptron on the time embedding, which this network does not have",
    "label_emb": "class conditioning, which this network does not have",
    "uncond_embed": "class conditioning, which this network does not have",
}


def find_layout(state: Mapping[str, Tensor]) -> Layout:
    """Which project's names these are, told by the output layer.

    Raises:
        InputError: neither.
    """
    for layout, name in OUTPUT.items():
        if f"{name}.weight" in state:
            return layout
    raise InputError(
        f"key {min(state)!r}: neither {OUTPUT['maskdm']}.weight nor {OUTPUT['maskdm-dwt']}.weight (MaskDM) nor "
        f"{OUTPUT['uvit']}.weight (U-ViT)"
    )


def whole_biases(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state with MaskDM's biases of query and value as one of query, key and value, which has 0 for the key.

    Raises:
        InputError: a bias of query or value alone, or two that do not fit each other; the line names the key.
    """
    found = dict(state)
    for key in [key for key in state if key.endswith(("attn.q_bias", "attn.v_bias"))]:
        block = key[: -len("q_bias")]
        pair = [found.pop(f"{block}{name}", None) for name in ("q_bias", "v_bias")]
        if not any(x is not None for x in pair):
            continue
        query, value = pair
        if query is None or value is None or f"{block}qkv.bias" in state:
            raise InputError(f"key {key!r} does not fit: it is a bias of the attention beside which no other fits")
        if query.ndim != 1 or query.shape != value.shape:
            shapes = f"{tuple(query.shape)} and {tuple(value.shape)}"
            raise InputError(f"key {key!r}: biases of query and value have shapes {shapes}, equally many numbers fit")
        parts = [dense_numbers(f"{block}q_bias", query), dense_numbers(f"{block}v_bias", value)]
        found[f"{block}qkv.bias"] = torch.cat([parts[0], torch.zeros_like(parts[0]), parts[1]])
    return found


def describe(
    state: Mapping[str, Tensor], layout: Layout, diffusion: "Diffusion", num_heads: int | None = None
) -> Experiment:
    """The experiment whose network has these shapes.

    Raises:
        InputError: a shape that no size has, the line names the key; or a schedule that nothing can be sampled with.
    """
    embedding, positions = foreign_name("embedding.weight", layout), POSITIONS[layout]
    if missing := [key for key in (embedding, positions) if key not in state]:
        raise InputError(f"key {missing[0]!r} is missing: give a complete checkpoint")
    if state[embedding].ndim != 4 or state[positions].ndim != 3:
        raise InputError(f"key {embedding!r} or {positions!r} has an unknown shape: give a checkpoint of {layout}")
    width, channels, patch_size, _ = state[embedding].shape
    is_split = layout == "maskdm-dwt"
    grid_size = math.isqrt((state[positions].shape[1] - 1) // (2 if is_split else 1))
    count, fitting = 1 + grid_size**2 * (2 if is_split else 1), (3,) if is_split else (3, 12)
    if count != state[positions].shape[1] or channels not in fitting:
        raise InputError(
            f"keys {positions!r} and {embedding!r}: {state[positions].shape[1]} positions and {channels} channels, "
            f"where 1 + {'twice ' if is_split else ''}a square and {'3' if is_split else '3 or 12 (wavelet)'} fit"
        )
    blocks = {key.removeprefix(PREFIX[layout]).split(".")[1] for key in state if "in_blocks." in key}
    size, is_wavelet = _size(embedding, width, 2 * len(blocks) + 1, num_heads), is_split or channels == 12
    image_size = grid_size * patch_size * (2 if is_wavelet else 1)
    model = {"size": size, "image_size": image_size, "patch_size": patch_size}
    # The authors' weights are sampled as the authors sample them.
    theirs = {} if layout == "uvit" else {"rederive_eps": False, "ddim_grid": "truncated"}
    tree = {
        "model": {**model, "qkv_bias": any(key.endswith("attn.qkv.bias") for key in state)},
        "data": {"wavelet": "haar" if is_wavelet else "", "wavelet_tokens": "split" if is_split else "joint"},
        "diffusion": {"schedule": diffusion.schedule, "timesteps": diffusion.timesteps},
        "evaluation": {"steps": min(diffusion.timesteps, EvaluationConfig().steps), **theirs},
    }
    try:
        return Experiment.model_validate(tree)
    except ValidationError as error:
        raise InputError(f"the file describes no experiment: {explain(error)}") from error


def from_foreign(state: Mapping[str, Tensor], layout: Layout, model: UViT) -> dict[str, Tensor]:
    """Rename and reshape a foreign state dict into float32 tensors of `model` (which may be on the meta device).

    Raises:
        InputError: a key is missing, superfluous, or has another shape; the line names it, with the reason if known.
    """
    left, ours = dict(state), {}
    for name, parameter in model.named_parameters():
        key = foreign_name(name, layout)
        if key not in left:
            raise InputError(f"key {key!r} is missing: give a complete checkpoint")
        tensor = dense_numbers(key, left.pop(key))
        if name in _KERNELS and tensor.ndim == 4:
            tensor = tensor.permute(0, 2, 3, 1).flatten(1)
        elif name == "positions.weight":
            tensor = tensor.squeeze(0)
        if tensor.shape != parameter.shape:
            raise InputError(f"key {key!r} has shape {tuple(tensor.shape)}, {tuple(parameter.shape)} would fit")
        ours[name] = tensor
    for key in left:
        reason = next((text for part, text in _REASONS.items() if part in key), "nothing this network has")
        raise InputError(f"key {key!r} does not fit: it is {reason}")
    return ours


def to_foreign(ours: Mapping[str, Tensor], layout: Layout, patch_size: int) -> dict[str, Tensor]:
    """The inverse of `from_foreign`."""
    state = {}
    for name, tensor in ours.items():
        key = foreign_name(name, layout)
        if name in _KERNELS:
            state[key] = tensor.view(len(tensor), patch_size, patch_size, -1).permute(0, 3, 1, 2).contiguous()
        elif key.endswith("attn.qkv.bias") and layout != "uvit":
            block = key.removesuffix("qkv.bias")
            query, _, value = tensor.chunk(3)
            state |= {f"{block}q_bias": query.contiguous(), f"{block}v_bias": value.contiguous()}
        else:
            state[key] = tensor[None] if name == "positions.weight" else tensor
    return state


def _size(key: str, width: int, num_blocks: int, num_heads: int | None) -> str:
    known = []
    for size in SIZES:
        model = meta_model(Experiment.model_validate({"model": {"size": size}}))
        shape = (model.width, len(model.in_blocks) * 2 + 1, model.mid_block.attention.num_heads)
        if shape == (width, num_blocks, num_heads or shape[2]):
            return size
        known.append(f"{size} {shape}")
    found = f"width {width}, {num_blocks} blocks" + (f", {num_heads} heads" if num_heads else "")
    raise InputError(f"key {key!r}: {found} is none of the sizes (width, blocks, heads) {', '.join(known)}")


def meta_model(experiment: Experiment) -> UViT:
    """The network of an experiment as names and shapes only."""
    with torch.device("meta"):
        model = build_model(experiment)
    assert isinstance(model, UViT)
    return model
