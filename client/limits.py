"""The numbers of a site's policy that bound a request: ranges of its constants, and how models are audited.

They are the site's own. What a request chooses outside of them is refused before anything is allocated or charged.
"""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Literal, Self

from pydantic import Field, model_validator

from shared.experiment.config import Experiment, Section

Range = tuple[float, float]
"""Smallest and largest value, both allowed."""


class Ranges(Section):
    """What a request may choose: for each constant its smallest and its largest value."""

    max_grad_norm: Range = (1e-4, 100.0)
    """C, the clipping norm of a unit's gradient."""
    noise_multiplier: Range = (0.01, 1e4)
    """sigma; `min_noise_multiplier` is the lower end that privacy asks for, accounting is checked up to the upper."""
    delta: Range = (1e-10, 1e-3)
    lr: Range = (0.0, 0.01)
    betas: Range = (0.5, 0.9999)
    """Both of Adam's: without memory, or at a huge learning rate, an update spells the gradient out."""
    weight_decay: Range = (0.0, 1.0)
    proximal_mu: Range = (0.0, 1000.0)
    draws: Range = (1, 64)
    micro_batch: Range = (1, 1024)
    expected_batch: Range = (1, 65_536)
    batch: Range = (1, 1024)
    accumulation: Range = (1, 1024)
    timesteps: Range = (50, 10_000)
    """T: with two time steps a network of chosen weights sees its images without noise."""
    images_per_round: Range = (1, 2_000_000)
    """Images that one round computes: steps x batch x draws."""
    rounds: Range = (1, 10_000)
    """Of a whole plan, so that its epsilon can be computed."""
    parameters: Range = (1, 300e6)
    """Values in the model's tensors, trained and frozen."""
    tokens: Range = (1, 4096)
    """Patches of one image."""
    projection_radius: Range = (1e-3, 1e4)
    """Norm that the projected features of private statistics are clipped to."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for name in type(self).model_fields:
            low, high = getattr(self, name)
            if not (math.isfinite(low) and math.isfinite(high) and 0 <= low <= high):
                raise ValueError(f"{name} = [{low:g}, {high:g}]: give two finite numbers, the smaller one first")
        if self.delta[0] < 1e-10 or self.delta[1] > 1e-3:
            raise ValueError(f"delta = {list(self.delta)}: accounting holds from 1e-10 to 1e-3, stay inside")
        return self

    def outside(self, name: str, value: float) -> str:
        """Why a value is refused, with the range; empty when it lies inside. NaN lies nowhere."""
        low, high = getattr(self, name)
        return "" if low <= value <= high else f"{name} {value:g} is outside this site's {low:g} to {high:g}"

    def all_outside(self, experiment: Experiment) -> Iterator[str]:
        """Each constant of an experiment that is outside of its range, in words."""
        return (text for name, value in _constants(experiment) if (text := self.outside(name, value)))

    def first_outside(self, experiment: Experiment, num_parameters: int | None = None) -> str:
        """The first of them, or the number of parameters; empty when there is none."""
        size = "" if num_parameters is None else self.outside("parameters", num_parameters)
        return next(self.all_outside(experiment), size)


class AuditPolicy(Section):
    """How the site audits a model for the coordinator: all of it is the site's, a request names the model only."""

    max_per_run: int = Field(0, ge=0)
    """Verdicts on models of one training run, counted when their work begins."""
    noise_multiplier: float = Field(4.0, ge=0.5, le=1000)
    """sigma of the noise on the counts, whose sensitivity is 1: what each audit is charged, at q = 1, one step."""
    score_edges: tuple[float, ...] = Field(
        (-0.5, -0.2, -0.1, 0.0, 0.1, 0.2, 0.4, 0.8, 1.6), min_length=1, max_length=31
    )
    """Thresholds of a unit's score, the logarithm of its loss under the reference over that under the model."""
    copy_ratio: float = Field(0.2, gt=0, lt=1)
    """A unit is copied when some sample of the model is nearer than this times the nearest sample of the reference."""
    max_auc: float = Field(0.60, gt=0.5, lt=0.65)
    """Largest AUC of the noisy counts that passes; the number of held-out units follows from it."""
    max_copied: float = Field(0.05, gt=0, le=1)
    """Largest share of the units that the model copies, beyond the share among held-out units, that passes."""
    num_images: int = Field(1000, ge=1, le=10_000)
    """Samples of each network in the copy test."""
    control_steps: int = Field(1000, ge=1, le=100_000)
    """Training of the control model, on public images."""

    @model_validator(mode="after")
    def _rising(self) -> Self:
        if not all(math.isfinite(edge) for edge in self.score_edges) or any(
            low >= high for low, high in pairwise(self.score_edges)
        ):
            raise ValueError(f"score_edges {list(self.score_edges)}: give finite numbers, each above the one before")
        return self


class SecurePolicy(Section):
    """What the site asks of rounds whose updates are masked, so that the coordinator sees their sum only."""

    require: bool = False
    """Refuse whatever would show the coordinator this site's own: updates that are not masked, exact statistics."""
    min_peers: int = Field(3, ge=3, le=64)
    """Fewest sites in a sum, this one included."""
    max_colluding: int = Field(0, ge=0, le=62)
    """Sites that may work together with the coordinator; with each, more of the others have to answer in a round."""
    rosters: Literal["approved", "any"] = "approved"
    """`approved`: only with sites whose names and keys the operator has approved; `any`: whoever the coordinator names.
    """


def _constants(experiment: Experiment) -> list[tuple[str, float]]:
    """Every constant with a range that the plan of an experiment uses."""
    train, federation, privacy, optim = experiment.train, experiment.federation, experiment.privacy, experiment.optim
    is_private = privacy.mechanism != "none"
    batch, draws = (privacy.expected_batch, privacy.draws) if is_private else (train.batch, 1)
    found: list[tuple[str, float]] = [
        ("lr", optim.lr),
        ("betas", optim.betas[0]),
        ("betas", optim.betas[1]),
        ("weight_decay", optim.weight_decay),
        ("proximal_mu", federation.proximal_mu),
        ("batch", train.batch),
        ("accumulation", train.accumulation),
        ("timesteps", experiment.diffusion.timesteps),
        ("images_per_round", federation.local_steps * batch * draws),
        ("rounds", federation.rounds),
        ("tokens", experiment.num_tokens),
    ]
    if is_private:
        names = ("max_grad_norm", "noise_multiplier", "delta", "draws", "micro_batch", "expected_batch")
        found += [(name, getattr(privacy, name)) for name in names]
        found += [("noise_multiplier", privacy.mean_image_noise)] if privacy.mean_image_noise else []
    return found
