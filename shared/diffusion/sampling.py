# ruff: noqa: N803, N806 - shape suffixes
"""Images of a network: its start noise, the network on whole images, and the sampler that the experiment names.

Shapes: B images, C channels, H W pixels (or coefficients) of the network's input, N patches, P numbers of a patch.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from shared.diffusion.dwt import highest
from shared.diffusion.patches import patchify_groups, unpatchify_groups
from shared.diffusion.samplers import Denoise, ddim, ddpm, dpm_solver_pp_2m
from shared.diffusion.schedule import Schedule
from shared.experiment.config import Experiment

_NOISE_AHEAD = 8


@torch.no_grad()
def sample(
    model: nn.Module,
    schedule: Schedule,
    experiment: Experiment,
    x_T_BCHW: Tensor,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """Solve from x_T to x_0 by the sampler that `experiment.evaluation` names.

    Image k depends on x_T[k] and generators[k] only (up to rounding inside the network), whatever else is in the batch.

    Args:
        model: tokens, t, ids -> tokens; any precision, its output is cast to float32.
        schedule: the forward process.
        experiment: gives sampler, its options, prediction, patch size and wavelet.
        x_T_BCHW: (B, C, H, W) start noise, see `draw_start`.
        generators: one for each image, on the device of `x_T_BCHW`.

    Returns:
        x_0: (B, C, H, W) float32 in the network's range, which `clip_x_0` keeps it in; wavelet bands where
        `data.wavelet` is set.

    Raises:
        InputError: more steps than T.
    """
    config = experiment.evaluation
    denoise = denoiser(model, experiment)
    noise = noise_of_each(generators, x_T_BCHW.shape[1:])
    kind, clip = experiment.diffusion.prediction, config.clip_x_0
    top = highest(experiment.data).to(x_T_BCHW.device) if len(experiment.sequences) > 1 else 1.0
    match config.sampler:
        case "ddpm":
            return ddpm(
                denoise,
                schedule,
                x_T_BCHW,
                noise,
                num_steps=config.steps,
                prediction=kind,
                clip_x_0=clip,
                highest=top,
            )
        case "ddim":
            return ddim(
                denoise,
                schedule,
                x_T_BCHW,
                noise,
                num_steps=config.steps,
                eta=config.eta,
                prediction=kind,
                clip_x_0=clip,
                highest=top,
                rederive_eps=config.rederive_eps,
                is_truncated=config.ddim_grid == "truncated",
            )
        case "dpm++":
            return dpm_solver_pp_2m(
                denoise, schedule, x_T_BCHW, num_steps=config.steps, prediction=kind, clip_x_0=clip, highest=top
            )


def draw_start(experiment: Experiment, generators: Sequence[torch.Generator]) -> Tensor:
    """x_T: (B, C, H, W) float32 standard normal noise, row k from generator k and on its device."""
    side = experiment.grid_size * experiment.model.patch_size
    return _stacked_noise(generators, (experiment.in_channels, side, side))


def noise_of_each(generators: Sequence[torch.Generator], shape: Sequence[int]) -> Iterator[Tensor]:
    """Endless (B, *shape) standard normal noise, row k from generator k.

    A fixed number of steps is drawn at a time: one launch per image and step would bind a large batch on a GPU.
    """
    while True:
        yield from _stacked_noise(generators, (_NOISE_AHEAD, *shape)).unbind(1)


def denoiser(model: nn.Module, experiment: Experiment) -> Denoise:
    """The network on whole images: patchify, every patch visible, unpatchify; float32 out."""
    patch_size, groups = experiment.model.patch_size, experiment.sequences

    def denoise(x_t_BCHW: Tensor, t: int) -> Tensor:
        batch = len(x_t_BCHW)
        tokens_BNP = patchify_groups(x_t_BCHW, patch_size, groups)
        t_B = torch.full((batch,), t, device=x_t_BCHW.device)
        output_BNP = model(tokens_BNP, t_B, every_patch(experiment, batch, x_t_BCHW.device))
        return unpatchify_groups(output_BNP.float(), patch_size, groups)

    return denoise


def every_patch(experiment: Experiment, batch: int, device: torch.device) -> Tensor:
    """(B, L) numbers of all patches, of each sequence one after the other."""
    ids_N = torch.arange(experiment.grid_size**2, device=device)
    return ids_N.repeat(len(experiment.sequences)).expand(batch, -1)


def _stacked_noise(generators: Sequence[torch.Generator], shape: Sequence[int]) -> Tensor:
    return torch.stack([torch.randn(*shape, generator=generator, device=generator.device) for generator in generators])
