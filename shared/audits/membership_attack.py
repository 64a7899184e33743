# ruff: noqa: N806
"""Membership inference: can one tell from a model whether an image was in its training set?

Every attack gives each image a score, higher for members. The strong one subtracts the logarithm of the loss under a
reference model that never saw the images, times the factor that predicts the others best: what makes an image easy for
every model cancels, and a reference that tells nothing does no harm. Shapes: N images, C channels, H W pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from shared.diffusion.dwt import to_network
from shared.diffusion.losses import per_image_loss, to_model_range
from shared.diffusion.samplers import Denoise
from shared.diffusion.sampling import denoiser, every_patch
from shared.diffusion.schedule import make_schedule
from shared.experiment.config import Experiment
from shared.seeding import Streams

Scores = NDArray[np.float64]
DRAWS = 16
TIMES = (0.05, 0.1)
"""Attacked noise levels as shares of T (t = 50 and 100 of 1000), fixed beforehand: choosing the best one afterwards
would flatter the attack. Small t carries the signal; from 0.3 on all attacks are at chance."""
FALSE_POSITIVE_RATE = 0.01


@dataclass(frozen=True)
class AttackResult:
    """How well one attack separates members from others."""

    auc: float
    """Area under the ROC curve: 0.5 is chance, 1 is certainty."""
    auc_interval: tuple[float, float]
    tpr: float
    """Share of members found while 1 percent of the others are taken for members."""
    tpr_interval: tuple[float, float]


def loss_scores(
    model: nn.Module, experiment: Experiment, images: Tensor, *, time: float, seed: int = 7, batch: int = 64
) -> Scores:
    """Minus the denoising loss at one t, the mean over `DRAWS` noises; every image meets the same noises.

    Args:
        model: the network, in evaluation mode.
        experiment: its geometry, schedule and prediction.
        images: uint8 (N, 3, H, W).
        time: t as a share of T.
        seed: of the noises; equal for a model and its reference.
        batch: images per network call.

    Returns:
        (N,) scores, higher for members.
    """
    device = next(model.parameters()).device
    schedule = make_schedule(experiment.diffusion.schedule, experiment.diffusion.timesteps).to(device)
    index = round(time * (experiment.diffusion.timesteps - 1))
    num_patches, patch_values = experiment.grid_size**2, experiment.model.patch_size**2 * experiment.in_channels
    generator = Streams(seed).generator("membership", index)
    total = torch.zeros(len(images), dtype=torch.float64)
    for _ in range(DRAWS):
        eps_1NP = torch.randn(1, num_patches, patch_values, generator=generator).to(device)
        for start in range(0, len(images), batch):
            part = images[start : start + batch].to(device)
            ids = every_patch(experiment, len(part), device)
            t_B = torch.full((len(part),), index, device=device)
            with torch.inference_mode():
                loss = per_image_loss(model, schedule, experiment, part, t_B, eps_1NP.expand(len(part), -1, -1), ids)
            total[start : start + batch] -= loss.double().cpu()
    scores: Scores = (total / DRAWS).numpy()
    return scores


def pia_scores(model: nn.Module, experiment: Experiment, images: Tensor, *, time: float, batch: int = 64) -> Scores:
    """Proximal initialisation attack (arXiv 2305.18355): the noise the model sees in the clean image, put to the test.

    eps = eps_theta(x_0, 0); score = -|| eps - eps_theta(sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, t) ||_4^4.
    Two calls per image. Arguments and result as in `loss_scores`.
    """
    device = next(model.parameters()).device
    schedule = make_schedule(experiment.diffusion.schedule, experiment.diffusion.timesteps)
    denoise, index = _eps_of(model, experiment), round(time * (experiment.diffusion.timesteps - 1))
    signal, noise = float(schedule.signal[index]), float(schedule.noise[index])
    found = []
    for start in range(0, len(images), batch):
        x_0 = to_network(to_model_range(images[start : start + batch].to(device)), experiment.data)
        with torch.inference_mode():
            eps = denoise(x_0, 0)
            again = denoise(signal * x_0 + noise * eps, index)
        found.append(-(again - eps).abs().pow(4).flatten(1).sum(1).double().cpu())
    scores: Scores = torch.cat(found).numpy()
    return scores


def _eps_of(model: nn.Module, experiment: Experiment) -> Denoise:
    """The network as eps_theta, whatever it predicts."""
    denoise, kind = denoiser(model, experiment), experiment.diffusion.prediction
    schedule = make_schedule(experiment.diffusion.schedule, experiment.diffusion.timesteps)

    def eps(x_t: Tensor, t: int) -> Tensor:
        output = denoise(x_t, t)
        signal, noise = float(schedule.signal[t]), float(schedule.noise[t])
        match kind:
            case "eps":
                return output
            case "x_0":
                return (x_t - signal * output) / noise
            case "v":
                return signal * output + noise * x_t

    return eps


def attack(
    model: nn.Module, references: Sequence[nn.Module], experiment: Experiment, members: Tensor, others: Tensor
) -> dict[str, AttackResult]:
    """All attacks on one model: plain loss and PIA, and the loss calibrated by each reference, at the fixed times.

    Args:
        model: the network under audit.
        references: networks that saw neither members nor others; the first public, further ones fine-tuned from it.
        experiment: geometry and schedule, common to all networks.
        members: uint8 (N, 3, H, W) training images.
        others: uint8 (M, 3, H, W) images of other persons, never trained on.

    Returns:
        Attack name to result; `calibrated` is the better of the references, by AUC.
    """
    images = torch.cat([members, others])

    def result(scores: Scores) -> AttackResult:
        return separation(scores[: len(members)], scores[len(members) :])

    losses = _mean_over_times(model, experiment, images)
    found = {"loss": result(losses)}
    pia = np.mean([_standardised(pia_scores(model, experiment, images, time=time)) for time in TIMES], axis=0)
    found["pia"] = result(pia)
    calibrated = []
    for reference in references:
        theirs = _mean_over_times(reference, experiment, images)
        calibrated.append(result(calibrate(losses, theirs, slice(len(members), None))))
    if calibrated:
        found["calibrated"] = max(calibrated, key=lambda each: each.auc)
    return found


def calibrate(scores: Scores, reference_scores: Scores, others: slice) -> Scores:
    """Minus the log loss, plus the factor times the reference's log loss that predicts it best on `others`.

    Both arguments are minus losses, (N,); the factor is clipped to [0, 1].
    """
    ours, theirs = np.log(-scores), np.log(-reference_scores)
    centred, wanted = theirs[others] - theirs[others].mean(), ours[others] - ours[others].mean()
    # One formula for both sums: a reference that equals the model gets exactly 1, and nothing of it is left.
    spread = float(np.sum(centred * centred))
    factor = float(np.sum(centred * wanted)) / spread if spread > 0 else 0.0
    found: Scores = min(1.0, max(0.0, factor)) * theirs - ours
    return found


def _mean_over_times(model: nn.Module, experiment: Experiment, images: Tensor) -> Scores:
    mean: Scores = np.mean([loss_scores(model, experiment, images, time=time) for time in TIMES], axis=0)
    return mean


def _standardised(scores: Scores) -> Scores:
    scaled: Scores = (scores - scores.mean()) / (scores.std() or 1.0)
    return scaled


def separation(members: Scores, others: Scores, *, resamples: int = 200, seed: int = 0) -> AttackResult:
    """AUC and TPR at 1 percent FPR of two sets of scores, with 95 percent bootstrap intervals over images."""
    rng = np.random.default_rng(seed)
    drawn = [(rng.choice(members, len(members)), rng.choice(others, len(others))) for _ in range(resamples)]
    aucs, tprs = [area(*pair) for pair in drawn], [tpr_at(*pair) for pair in drawn]
    return AttackResult(area(members, others), _interval(aucs), tpr_at(members, others), _interval(tprs))


def area(members: Scores, others: Scores) -> float:
    """P(member scores higher than other), ties counted half: the area under the ROC curve (Mann and Whitney)."""
    ordered = np.sort(others)
    below, not_above = np.searchsorted(ordered, members, "left"), np.searchsorted(ordered, members, "right")
    return float((below + not_above).mean() / 2 / len(others))


def tpr_at(members: Scores, others: Scores, rate: float = FALSE_POSITIVE_RATE) -> float:
    """Share of members above the threshold that at most `rate` of the others exceed."""
    allowed = int(rate * len(others))
    threshold = np.sort(others)[::-1][min(allowed, len(others) - 1)]
    return float((members > threshold).mean())


def _interval(values: list[float]) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
