"""The noise schedule that MaskDM keeps in tables beside its weights."""

from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from shared.diffusion.schedule import make_schedule
from shared.errors import InputError

ScheduleKind = Literal["linear", "cosine"]


class Diffusion(NamedTuple):
    """The forward process of a file."""

    schedule: ScheduleKind
    timesteps: int


_OWN_WAY = {"loss_weight", "posterior_log_variance_clipped"}
"""Tables that other programs weigh or clip in ways of their own."""


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
