"""The public stages of the private demo: they fill what is left of the budget, in shares that are told."""

import pytest

from server.simulation.demo.public_stages import EVALUATIONS, FIRST_STEPS, LEAST_ALIGNED, SET_UP_SECONDS, plan_stages
from server.simulation.demo_budget import END_SECONDS, FORWARD_SPEEDUP, Budget
from shared.experiment.config import parse_experiment
from shared.planning.workload import DP_SLOWDOWN

PUBLIC = parse_experiment("[train]\nbatch=32\nsteps=100000")
PRIVATE = parse_experiment(
    '[federation]\nrounds=2\nlocal_steps=3\n[privacy]\nmechanism="dp-sgd"\nexpected_batch=100\ndraws=2\n'
    "[evaluation]\nnum_images=200\nsteps=7"
)
DP_IMAGES = DP_SLOWDOWN * 2 * 3 * 4 * 100 * 2


def test_all_stages_together_take_what_is_left():
    stages = plan_stages(Budget(3600), 50.0, PUBLIC, PRIVATE, num_sites=4)
    images = 32 * (stages.start + stages.aligned + stages.alone) + DP_IMAGES
    images += EVALUATIONS * 200 * (7 / FORWARD_SPEEDUP + 1)
    assert images / 50.0 == pytest.approx(3600 - SET_UP_SECONDS - END_SECONDS, rel=0.01)
    assert not stages.is_over


def test_public_images_alone_get_the_compute_of_the_private_stages():
    stages = plan_stages(Budget(3600), 50.0, PUBLIC, PRIVATE, num_sites=4)
    assert 32 * (stages.alone - stages.aligned) == pytest.approx(DP_IMAGES, abs=32)
    assert stages.aligned == pytest.approx(1.5 * stages.start, abs=2)


def test_a_recipe_bounds_the_stages_and_too_little_time_is_told():
    short = PUBLIC.model_copy(update={"train": PUBLIC.train.model_copy(update={"steps": 60})})
    assert plan_stages(Budget(36000), 500.0, short, PRIVATE, 2).aligned == 60
    late = plan_stages(Budget(90), 50.0, PUBLIC, PRIVATE, 2)
    assert (late.start, late.aligned, late.is_over) == (FIRST_STEPS, LEAST_ALIGNED, True)
