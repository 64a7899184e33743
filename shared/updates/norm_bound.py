"""How long one site's update may be: a constant of the experiment, the same in every round and for every site.

A recipe says a number that was measured on honest rounds. Where none is said the bound is the longest update that
AdamW can make in the round's steps, whatever the images are: no honest site is ever above it.
"""

import math

from shared.experiment.config import Experiment
from shared.experiment.learning_rate import round_lr
from shared.updates.int8_blocks import LARGEST, ROUNDED

LARGEST_LOG = 700.0
"""Of what a float holds."""
DECAY_MARGIN = 1.01
"""For the pull of weight decay: it is below 1 percent of a step while weights are below 0.3 in root mean square."""
INT8_MARGIN = ROUNDED / (1 - ROUNDED / (2 * LARGEST))
"""What a site adds to an update of 8 bits is at most half a scale a number, that is 1 / 254 of the largest number that
it has sent before, which is that of an update and again what was added to it: a geometric series."""


def norm_bound(experiment: Experiment, num_elements: int) -> float:
    """Largest L2 norm of one site's update of `num_elements` numbers; 0: none is set."""
    federation = experiment.federation
    if federation.max_update_norm != "auto":
        return federation.max_update_norm
    margin = DECAY_MARGIN * (INT8_MARGIN if federation.wire_dtype == "int8" else 1.0)
    return margin * math.sqrt(num_elements) * longest_path(experiment)


def longest_path(experiment: Experiment) -> float:
    """How far the steps of one round of AdamW can take one weight: learning rates times `largest_step`.

    Muon's are shorter: with singular values of at most 1.21 (`torch.optim.Muon`'s five iterations) a matrix of n
    elements moves by at most 0.25 sqrt(n) times the learning rate.

    Where the warm-up is the run's, later rounds have none; where moments stay at the sites, the last round's are the
    oldest.
    """
    federation, optim = experiment.federation, experiment.optim
    rate = round_lr(experiment, federation.rounds)
    before = (federation.rounds - 1) * federation.local_steps if federation.keep_moments else 0
    steps = range(federation.local_steps)
    return sum(rate(step) * largest_step(optim.betas, before + step + 1) for step in steps)


def largest_step(betas: tuple[float, float], count: int) -> float:
    """Largest |m_hat| / sqrt(v_hat) of the `count`-th step (AdamW, arXiv 1711.05101, Algorithm 2), over all gradients.

    m_hat = sum a_i g_i and v_hat = sum b_i g_i^2 with a_i, b_i geometric weights that add up to 1, so by Cauchy-Schwarz
    |m_hat| <= sqrt(sum a_i^2 / b_i) sqrt(v_hat): 1 where both betas are alike.
    """
    beta_1, beta_2 = betas
    if beta_1 == beta_2:
        return 1.0
    ratio = beta_1**2 / beta_2 if beta_2 else math.inf
    if ratio > 1 and count * math.log(ratio) > LARGEST_LOG:
        return math.inf  # v_hat forgets so fast that it may be as small as it likes
    first, second = (1 - beta**count for beta in betas)
    powers = count if ratio == 1 else (1 - ratio**count) / (1 - ratio)
    return (1 - beta_1) / first * math.sqrt(second / (1 - beta_2) * powers)
