# ruff: noqa: N806
"""DP-SGD on one site, and what it costs: the only module that imports Opacus.

Each step takes every unit (image or person) with probability q, clips each unit's gradient to C, adds Gaussian noise of
deviation sigma C to the sum and divides by a public constant (Abadi et al., arXiv 1607.00133, algorithm 1). Nothing in
the step depends on how many units there are. K noise draws of one unit are folded into the token axis, so the unit's
gradient is that of their mean and clipping acts once.

Shapes: B units of a micro-batch, K draws per unit, C channels, H W pixels, L tokens, D width.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from opacus.accountants import PRVAccountant, RDPAccountant
from opacus.accountants.analysis import rdp as renyi
from opacus.accountants.analysis.prv import DiscretePRV, Domain, PoissonSubsampledGaussianPRV
from opacus.accountants.analysis.prv.prvs import TruncatedPrivacyRandomVariable
from opacus.grad_sample import GradSampleHooks, register_grad_sampler
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from torch import Tensor, nn

from client.clipping import clipped_gradients, position_gradients, validate
from client.fourier import fast_length, power
from client.spending import Spending, merged
from client.units import Ids, Images, load_units, secret_generator
from shared.config import Experiment
from shared.losses import draw_noise, per_image_loss
from shared.optim import lr_at, make_optimizer, set_lr
from shared.schedule import make_schedule
from shared.uvit import Positions

ERRORS = (0.01, 0.1, 1.0)
"""What the numerical error may add to epsilon; the larger ones where a huge epsilon leaves no memory for the first."""
LARGEST_GRID = 2**25
"""Points of the privacy loss distribution: about 2 GB."""
MARGINS = {"float32": 0.999, "bfloat16": 0.98}
"""Share of C that gradients are clipped to while the noise is set for C: rounding must not lift a norm above C."""


@register_grad_sampler(Positions)  # type: ignore[untyped-decorator]
def _sample_positions(layer: Positions, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    return {layer.weight: position_gradients(layer, activations[1], backprops)}


def epsilon(history: Sequence[Spending], delta: float) -> float:
    """Total epsilon of all steps of a data set at `delta`, an upper bound.

    Numerical composition of privacy random variables (Gopi et al., arXiv 2106.02848) for the Poisson-subsampled
    Gaussian mechanism under add/remove neighbours.

    Returns:
        0 for no steps; infinity where no bound can be computed.
    """
    rows = merged(list(history))
    if not rows:
        return 0.0
    if any(row.noise_multiplier <= 0 for row in rows):
        return math.inf
    accountant = _Accountant()
    accountant.history = [tuple(row) for row in rows]
    with np.errstate(all="ignore"), warnings.catch_warnings():
        # Opacus sizes its grid by RDP, which warns at large noise; the grid only gets wider than it has to be.
        warnings.simplefilter("ignore")
        for error in ERRORS:
            try:
                return float(accountant.get_epsilon(delta, eps_error=error))
            except _GridError:
                continue
            except (ValueError, RuntimeError, OverflowError, MemoryError):
                break
    return math.inf


class _GridError(RuntimeError):
    """The distribution of the privacy loss needs more points than fit into memory at this precision."""


class _Accountant(PRVAccountant):  # type: ignore[misc]
    """Opacus' accountant, with all rows composed in the Fourier domain and one inverse transform: the same numbers."""

    def _get_dprv(self, eps_error: float, delta_error: float) -> DiscretePRV:
        prvs = [PoissonSubsampledGaussianPRV(rate, sigma) for sigma, rate, _ in self.history]
        counts = [steps for _, _, steps in self.history]
        mesh = eps_error / math.sqrt(sum(counts) * math.log(12 / delta_error) / 2)
        reach = safe_reach(self.history, eps_error, delta_error)
        safe = Domain.create_aligned(-reach, reach, mesh)
        if safe.size > LARGEST_GRID:
            raise _GridError
        size = fast_length(safe.size)
        domain = Domain(-(size // 2 - 1) * safe.dt, size // 2 * safe.dt, size)
        spectrum, shift = np.ones(size // 2 + 1, np.complex128), 0.0
        for prv, count in zip(prvs, counts, strict=True):
            pmf, shift_of_one = _discretized(prv, domain)
            spectrum *= power(np.fft.rfft(pmf), count)
            shift += count * shift_of_one
        # The grid's zero is at index size / 2 - 1, so each of the M convolutions but one moves it by as much.
        total = sum(counts)
        pmf = np.roll(np.fft.irfft(spectrum, size), total - 1 + (size // 2 if total % 2 == 0 else 0))
        return DiscretePRV(pmf, domain.shift_right(shift))


def safe_reach(history: Sequence[tuple[float, float, int]], eps_error: float, delta_error: float) -> float:
    """Largest privacy loss that the grid has to hold (arXiv 2106.02848, remark 5.6), as Opacus computes it.

    Renyi divergences are most of the time that an epsilon takes, and they are the same at every number of steps: here
    they are computed once for each mechanism.
    """
    of_one = [_divergences(rate, sigma) for sigma, rate, _ in history]
    counts = [steps for _, _, steps in history]
    total = np.sum([steps * each for steps, each in zip(counts, of_one, strict=True)], axis=0)
    reach = _renyi_epsilon(total, delta_error / 4)
    return max(reach, eps_error, *(_renyi_epsilon(each, delta_error / (8 * sum(counts))) for each in of_one)) + 3


def _renyi_epsilon(divergences: NDArray[np.float64], delta: float) -> float:
    return float(renyi.get_privacy_spent(orders=RDPAccountant.DEFAULT_ALPHAS, rdp=divergences, delta=delta)[0])


@lru_cache(maxsize=1024)
def _divergences(rate: float, sigma: float) -> NDArray[np.float64]:
    """Renyi divergence of one step, at each of Opacus' orders."""
    orders = RDPAccountant.DEFAULT_ALPHAS
    return np.asarray(renyi.compute_rdp(q=rate, noise_multiplier=sigma, steps=1, orders=orders), np.float64)


def _discretized(prv: PoissonSubsampledGaussianPRV, domain: Domain) -> tuple[NDArray[np.float64], float]:
    """Probabilities on the grid, and the shift that gives them the mean of the continuous variable."""
    sigma, rate = prv.noise_multiplier, prv.sample_rate
    edges = np.linspace(domain.t_min - domain.dt / 2, domain.t_max + domain.dt / 2, domain.size + 1)
    # Above this both tails are below 1e-19: the distribution function is 1 in float64 and need not be computed.
    top = np.log1p(rate * np.expm1((6.5 * 2 * np.sqrt(2) * sigma + 1) / (2 * sigma**2)))
    first, last = np.searchsorted(edges, [np.log1p(-rate), top])
    cdf = np.zeros(domain.size + 1)
    cdf[first:last], cdf[last:] = prv.cdf(edges[first:last]), 1.0
    truncated = TruncatedPrivacyRandomVariable(prv, domain.t_min, domain.t_max)
    pmf = np.diff(cdf) / truncated._remaining_mass
    shift = float(truncated.mean() - np.dot(domain.ts, pmf))
    if not abs(shift) < domain.dt / 2:
        raise RuntimeError("the grid is too coarse for this plan")
    return pmf, shift


def train_private(
    model: nn.Module,
    experiment: Experiment,
    images: Images,
    units: Sequence[Ids],
    *,
    device: torch.device,
    precision: str = "float32",
    loss: Callable[..., Tensor] = per_image_loss,
    after_noise: Callable[[], None] = lambda: None,
    on_step: Callable[[int], None] = lambda _: None,
) -> None:
    """Run the steps of one round in place; the ledger has reserved them before.

    Args:
        model: on `device`; only tensors that require a gradient change.
        experiment: constants of `privacy`, `federation.local_steps`, optimizer and loss.
        images: source of image batches.
        units: image numbers of each unit of privacy.
        device: where the model is.
        precision: of the forward and backward pass.
        loss: losses (B,) of a micro-batch; takes what `per_image_loss` takes.
        after_noise: called on the noised gradients before the optimizer reads them (a data-independent term).
        on_step: called with the 0-based number of each finished step.
    """
    validate(model)
    privacy = experiment.privacy
    model.train()
    step = PrivateStep(model, experiment, device, precision, loss)
    # Never a seed that anybody else knows: who can repeat the noise can subtract it.
    pick, noise = secret_generator("cpu"), secret_generator(device)
    optimizer = step.optimizer(noise)
    try:
        for number in range(experiment.federation.local_steps):
            set_lr(optimizer.original_optimizer, lr_at(number, experiment.optim))
            chosen = (torch.rand(len(units), generator=pick, dtype=torch.float64) < privacy.sample_rate).nonzero()[:, 0]
            # An empty batch is one empty micro-batch: the step happens, adds noise and is counted.
            parts = torch.split(chosen, privacy.micro_batch)
            for part in parts:
                optimizer.signal_skip_step(do_skip=part is not parts[-1])
                optimizer.zero_grad()
                batch = load_units(images, [units[int(unit)] for unit in part], experiment, pick, device)
                step.backward(batch, noise)
                if optimizer.pre_step():
                    after_noise()
                    optimizer.original_optimizer.step()
            on_step(number)
    finally:
        step.close()
        optimizer.zero_grad(set_to_none=True)


class PrivateStep:
    """The two ways to clip: `fast` with flat memory, Opacus' `hooks` keeping every unit's gradient of a micro-batch."""

    def __init__(
        self,
        model: nn.Module,
        experiment: Experiment,
        device: torch.device,
        precision: str,
        loss: Callable[..., Tensor] = per_image_loss,
    ) -> None:
        self.model, self.experiment, self.device, self.precision = model, experiment, device, precision
        self.loss = loss
        self.schedule = make_schedule(experiment.diffusion.schedule, experiment.diffusion.timesteps).to(device)
        self.is_fast = experiment.privacy.clipping == "fast"
        # Fast clipping measures and sums in float32 whatever the precision; hooks do it in that of the backward pass.
        self.bound = MARGINS["float32" if self.is_fast else precision] * experiment.privacy.max_grad_norm
        self.hooks = None if self.is_fast else GradSampleHooks(model, loss_reduction="sum")

    def optimizer(self, noise: torch.Generator) -> DPOptimizer:
        """AdamW behind Opacus' noise; the noise is set for C, clipping is tighter by the margin."""
        privacy = self.experiment.privacy
        # loss_reduction "mean" only divides the noised sum by the public normaliser.
        kind = DPOptimizerFastGradientClipping if self.is_fast else _MarginOptimizer
        optimizer = kind(
            make_optimizer(self.model, self.experiment.optim),
            noise_multiplier=privacy.noise_multiplier,
            max_grad_norm=privacy.max_grad_norm,
            expected_batch_size=privacy.expected_batch,
            loss_reduction="mean",
            generator=noise,
        )
        if isinstance(optimizer, _MarginOptimizer):
            optimizer.clip_norm = self.bound
        return optimizer

    def backward(self, images: Tensor, generator: torch.Generator) -> None:
        """Leave the clipped gradients of a micro-batch where the optimizer of this kind collects them."""
        draw = draw_noise(self.experiment, len(images), generator, self.experiment.privacy.draws)

        def loss() -> Tensor:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
                return self.loss(self.model, self.schedule, self.experiment, images, *draw)

        if self.is_fast:
            clipped_gradients(self.model, loss, self.bound)
            return
        loss_B = loss()
        assert loss_B.shape == (len(images),)
        with warnings.catch_warnings():
            # The first layer's input is data and needs no gradient; its hook then sees output gradients, as it should.
            warnings.filterwarnings("ignore", "Full backward hook is firing")
            torch.autograd.backward(loss_B.sum())

    def close(self) -> None:
        """Take Opacus' hooks off the model again."""
        if self.hooks is not None:
            self.hooks.cleanup()


class _MarginOptimizer(DPOptimizer):  # type: ignore[misc]
    """Clips to `clip_norm`, adds noise for `max_grad_norm`."""

    clip_norm: float
    max_grad_norm: float

    def clip_and_accumulate(self) -> None:
        """Opacus' clipping at the tighter bound."""
        noise_norm, self.max_grad_norm = self.max_grad_norm, self.clip_norm
        try:
            super().clip_and_accumulate()
        finally:
            self.max_grad_norm = noise_norm
