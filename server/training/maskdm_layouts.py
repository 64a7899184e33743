"""Key names and shapes of the authors' MaskDM code and of U-ViT, against ours.

The three networks are the same function. They differ in names, in the patch embedding (their convolution with stride
equal to its kernel is our linear layer on flattened patches) and in a leading axis of 1 on the positions. Names were
read from https://github.com/jiachenlei/maskdm (commit 60d132b) and https://github.com/baofff/U-ViT (commit ce55170).
Patch values leave the last layer in the same order (row, column, channel) in all three.
"""

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

import torch
from pydantic import ValidationError
from torch import Tensor

from shared.diffusion.schedule import make_schedule
from shared.diffusion.uvit import SIZES, UViT, build_model
from shared.errors import InputError
from shared.experiment.config import Experiment, explain
from shared.experiment.sections import EvaluationConfig

Layout = Literal["maskdm", "uvit"]
ScheduleKind = Literal["linear", "cosine"]


class Diffusion(NamedTuple):
    """The forward process of a file."""

    schedule: ScheduleKind
    timesteps: int


_PREFIX: dict[Layout, str] = {"maskdm": "encoder.", "uvit": ""}
_POSITIONS: dict[Layout, str] = {"maskdm": "encoder.encoder_pos_embed", "uvit": "pos_embed"}
_OUTPUT: dict[Layout, str] = {"maskdm": "encoder_to_output", "uvit": "decoder_pred"}
_REASONS = {
    "final_layer": "a final convolution, and this network ends in one linear layer",
    "time_embed": "a perceptron on the time embedding, which this network does not have",
    "label_emb": "class conditioning, which this network does not have",
    "uncond_embed": "class conditioning, which this network does not have",
    "q_bias": "a bias of the attention's query alone, which this network does not have",
    "v_bias": "a bias of the attention's value alone, which this network does not have",
}


_OWN_WAY = {"loss_weight", "posterior_log_variance_clipped"}
"""Tables that other programs weigh or clip in ways of their own."""


def find_layout(state: Mapping[str, Tensor]) -> Layout:
    """Which project's names these are, told by the output layer.

    Raises:
        InputError: neither.
    """
    for layout, name in _OUTPUT.items():
        if f"{name}.weight" in state:
            return layout
    raise InputError(
        f"key {min(state)!r}: neither {_OUTPUT['maskdm']}.weight (MaskDM) nor {_OUTPUT['uvit']}.weight (U-ViT)"
    )


def describe(
    state: Mapping[str, Tensor], layout: Layout, diffusion: "Diffusion", num_heads: int | None = None
) -> Experiment:
    """The experiment whose network has these shapes.

    Raises:
        InputError: a shape that no size has, the line names the key; or a schedule that nothing can be sampled with.
    """
    embedding, positions = f"{_PREFIX[layout]}patch_embed.proj.weight", _POSITIONS[layout]
    if missing := [key for key in (embedding, positions) if key not in state]:
        raise InputError(f"key {missing[0]!r} is missing: give a complete checkpoint")
    if state[embedding].ndim != 4 or state[positions].ndim != 3:
        raise InputError(f"key {embedding!r} or {positions!r} has an unknown shape: give a checkpoint of {layout}")
    width, channels, patch_size, _ = state[embedding].shape
    grid_size = math.isqrt(max(0, state[positions].shape[1] - 1))
    if grid_size**2 != state[positions].shape[1] - 1 or channels not in (3, 12):
        raise InputError(
            f"keys {positions!r} and {embedding!r}: {state[positions].shape[1]} positions and {channels} channels, "
            "where 1 + a square and 3 or 12 (wavelet) fit"
        )
    blocks = {key.removeprefix(_PREFIX[layout]).split(".")[1] for key in state if "in_blocks." in key}
    size = _size(embedding, width, 2 * len(blocks) + 1, num_heads)
    scale = 2 if channels == 12 else 1
    model = {"size": size, "image_size": grid_size * patch_size * scale, "patch_size": patch_size}
    tree = {
        "model": {**model, "qkv_bias": any(key.endswith("attn.qkv.bias") for key in state)},
        "data": {"wavelet": "haar" if channels == 12 else ""},
        "diffusion": {"schedule": diffusion.schedule, "timesteps": diffusion.timesteps},
        "evaluation": {"steps": min(diffusion.timesteps, EvaluationConfig().steps)},
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
        if name == "embedding.weight":
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


def dense_numbers(key: str, tensor: Tensor) -> Tensor:
    """A weight or table as float32.

    Raises:
        InputError: sparse, quantised, empty, of integers, or with a number that is not finite; the line names the key.
    """
    what = f"{tensor.dtype}".removeprefix("torch.")
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_nested:
        raise InputError(f"key {key!r} is sparse, quantised or empty ({what}): store dense floating-point numbers")
    if not tensor.is_floating_point():
        raise InputError(f"key {key!r} holds {what} numbers, not floating-point ones: give the file before it")
    values = tensor.float()
    if lost := int((~torch.isfinite(values)).sum()):
        raise InputError(f"key {key!r} has {lost} of {values.numel()} numbers that are not finite: give an earlier one")
    return values


def to_foreign(ours: Mapping[str, Tensor], layout: Layout, patch_size: int) -> dict[str, Tensor]:
    """The inverse of `from_foreign`."""
    state = {}
    for name, tensor in ours.items():
        if name == "embedding.weight":
            kernel = tensor.view(len(tensor), patch_size, patch_size, -1).permute(0, 3, 1, 2).contiguous()
            state[foreign_name(name, layout)] = kernel
        else:
            state[foreign_name(name, layout)] = tensor[None] if name == "positions.weight" else tensor
    return state


def foreign_name(name: str, layout: Layout) -> str:
    """The key under which `layout` stores our parameter `name`."""
    module, _, kind = name.rpartition(".")
    if module == "positions":
        return _POSITIONS[layout]
    if module == "output":
        return f"{_OUTPUT[layout]}.{kind}"
    if module == "embedding":
        return f"{_PREFIX[layout]}patch_embed.proj.{kind}"
    block, dot, part = module.rpartition("attention.")
    theirs = f"{block}attn.{'proj' if part == 'projection' else part}" if dot else module
    theirs = f"{theirs}_linear" if theirs.endswith(".skip") else theirs
    return f"{_PREFIX[layout]}{theirs}.{kind}"


def schedule_tables(kind: ScheduleKind, timesteps: int) -> dict[str, Tensor]:
    """The float32 buffers that MaskDM keeps beside its weights; an import ignores all but `betas`."""
    schedule = make_schedule(kind, timesteps)
    beta, alpha, alpha_bar = schedule.beta, schedule.alpha, schedule.alpha_bar
    before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    variance = schedule.posterior_sigma.square()
    tables = {
        "betas": beta,
        "alphas": alpha,
        "alphas_cumprod": alpha_bar,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": alpha_bar.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - alpha_bar).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - alpha_bar).log(),
        "sqrt_recip_alphas_cumprod": (1 / alpha_bar).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / alpha_bar - 1).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": beta * before.sqrt() / (1 - alpha_bar),
        "posterior_mean_coef2": (1 - before) * alpha.sqrt() / (1 - alpha_bar),
        "loss_weight": torch.ones_like(beta),
    }
    return {name: table.float() for name, table in tables.items()}


def diffusion_of(tables: Mapping[str, Tensor], asked: ScheduleKind | None) -> Diffusion:
    """Which forward process MaskDM's stored tables are.

    Args:
        tables: those of the file, by their names in `schedule_tables`; may be empty.
        asked: the schedule that the user names; it decides where there are no tables, for 1000 steps.

    Raises:
        InputError: tables of neither schedule, that contradict each other or `asked`; or no table and nothing asked.
    """
    betas = tables.get("betas")
    if betas is None:
        if asked is None or tables:
            found = f"no table 'betas' beside {min(tables)!r}" if tables else "no schedule tables"
            raise InputError(f"the file has {found}: say which one it was trained with, --schedule linear or cosine")
        return Diffusion(asked, 1000)
    if betas.ndim != 1 or len(betas) < 2:
        raise InputError(f"key 'betas' has shape {tuple(betas.shape)}: a schedule has one row of at least 2 numbers")
    for kind in get_args(ScheduleKind):
        own = schedule_tables(kind, len(betas))
        if not _agrees(betas, own["betas"]):
            continue
        if asked not in (None, kind):
            raise InputError(f"key 'betas' is the {kind} schedule, not {asked}: leave out --schedule")
        for name in own.keys() & tables.keys() - _OWN_WAY:
            if not _agrees(tables[name], own[name]):
                raise InputError(f"key {name!r} contradicts 'betas' ({kind}, {len(betas)} steps): the file is damaged")
        return Diffusion(kind, len(betas))
    raise InputError(
        f"the file has key 'betas' of neither schedule for {len(betas)} steps: this version samples linear (1e-4 to "
        "0.02) and cosine"
    )


def _agrees(found: Tensor, own: Tensor) -> bool:
    return found.shape == own.shape and torch.allclose(found.float(), own, rtol=1e-4, atol=1e-6)


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
