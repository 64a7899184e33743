import math

import numpy as np
import pytest
import torch

from shared.experiment.config import Experiment
from shared.experiment.learning_rate import round_lr
from shared.updates.int8_blocks import rounded_with_feedback
from shared.updates.norm_bound import largest_step, longest_path, norm_bound


def experiment(**sections):
    return Experiment.model_validate(sections)


def test_a_number_of_the_experiment_is_the_bound_and_zero_is_none():
    assert norm_bound(experiment(federation={"max_update_norm": 2.5}), 10**6) == 2.5
    assert norm_bound(experiment(federation={"max_update_norm": 0.0}), 10**6) == 0.0


def test_by_default_the_bound_is_what_adamw_can_reach_in_a_round():
    with_ramp = experiment(optim={"lr": 0.02, "warmup_steps": 4}, federation={"local_steps": 6})
    rates = 0.02 * (0.25 + 0.5 + 0.75 + 1 + 1 + 1)
    assert norm_bound(with_ramp, 400) == pytest.approx(1.01 * 20 * rates)
    assert sum(map(round_lr(with_ramp, 1), range(6))) == pytest.approx(rates)


def test_no_round_of_a_run_with_one_warm_up_is_above_the_bound():
    """The last round has least of it left; it may still rise where the warm-up is longer than the run."""
    for ramp in (4, 9, 30):
        plan = experiment(
            optim={"lr": 0.02, "warmup_steps": ramp}, federation={"rounds": 3, "local_steps": 6, "warmup": "run"}
        )
        paths = [sum(map(round_lr(plan, number), range(6))) for number in (1, 2, 3)]
        assert longest_path(plan) == pytest.approx(max(paths)) and paths[0] < paths[2] <= 0.02 * 6 + 1e-9


@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.9, 0.999), (0.99, 0.99)])
def test_kept_moments_are_as_old_as_the_last_rounds(betas):
    """Older moments allow longer steps; those of a site that was away are younger."""
    federation = {"rounds": 4, "local_steps": 3, "keep_moments": True}
    plan = experiment(optim={"lr": 1.0, "betas": betas}, federation=federation)
    assert longest_path(plan) == pytest.approx(sum(largest_step(betas, count) for count in (10, 11, 12)))
    steps = [largest_step(betas, count) for count in range(1, 3000)]
    assert steps == sorted(steps) or betas[0] == betas[1]


def test_a_warm_up_from_zero_reaches_as_far_as_its_learning_rates():
    optim = {"lr": 0.02, "warmup_steps": 4, "warmup_from_zero": True}
    plan = experiment(optim=optim, federation={"local_steps": 6})
    assert longest_path(plan) == pytest.approx(sum(map(round_lr(plan, 1), range(6))))


def test_what_8_bits_lose_and_tell_later_stays_below_the_bound():
    """Updates as long as can be, of a site whose every number rounds as badly as a block allows."""
    federation = {"local_steps": 6, "rounds": 40}
    plan = experiment(optim={"lr": 0.02}, federation=federation | {"wire_dtype": "int8"})
    plain = experiment(optim={"lr": 0.02}, federation=federation)
    assert norm_bound(plan, 256) == pytest.approx(norm_bound(plain, 256) * 254 / 253, rel=1e-4)
    random, lost, longest = np.random.default_rng(0), None, 0.0
    for _ in range(40):
        signs = random.choice([-1.0, 1.0], 256)
        update = (norm_bound(plain, 256) / 16 * signs * random.choice([1.0, 126.5 / 127], 256)).astype(np.float32)
        update[0] = norm_bound(plain, 256) / 16
        arrives, lost = rounded_with_feedback(update, lost)
        longest = max(longest, float(np.linalg.norm(arrives.astype(np.float64))))
    assert longest <= norm_bound(plan, 256)


def walk(betas, gradients, lr=0.01):
    """Where torch's AdamW takes one weight that gets these gradients."""
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.AdamW([weight], lr, betas, eps=1e-30, weight_decay=0.0)
    path = [0.0]
    for gradient in gradients:
        weight.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        path.append(float(weight.detach()))
    return np.abs(np.diff(path)) / lr


@pytest.mark.parametrize("betas", [(0.99, 0.99), (0.9, 0.99), (0.9, 0.999), (0.0, 0.9), (0.95, 0.9)])
def test_no_gradients_make_a_step_longer_and_some_make_one_as_long(betas):
    random, count = np.random.default_rng(0), 12
    for gradients in (random.normal(size=count), random.standard_cauchy(count), np.ones(count)):
        steps = walk(betas, gradients)
        assert (steps <= [largest_step(betas, number + 1) + 1e-9 for number in range(count)]).all()
    # Gradients in proportion to a_i / b_i are those that reach the bound in the last step.
    worst = [(betas[0] / betas[1]) ** (count - 1 - number) for number in range(count)]
    if betas[0]:
        assert walk(betas, worst)[-1] == pytest.approx(largest_step(betas, count))


def test_with_like_betas_a_step_is_at_most_the_learning_rate_and_a_path_their_sum():
    assert largest_step((0.99, 0.99), 7) == 1.0

    def path(steps, **optim):
        return longest_path(experiment(optim=optim, federation={"local_steps": steps}))

    assert path(5, lr=0.3) == pytest.approx(1.5)
    expected = 0.3 * sum(largest_step((0.9, 0.99), k) for k in range(1, 6))
    assert path(5, lr=0.3, betas=(0.9, 0.99)) == pytest.approx(expected)
    for betas, steps in (((0.9, 0.0), 2), ((0.99, 0.5), 3000)):
        assert math.isinf(path(steps, betas=betas))
