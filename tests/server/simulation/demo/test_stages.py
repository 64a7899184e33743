"""The stages of the private demo fill what is left of the budget, in shares that are told, and are planned anew."""

import pytest

from server.simulation.demo.stages import (
    AFTER_SECONDS,
    FEWEST_MEASURED,
    FIRST_STEPS,
    LEAST_ALIGNED,
    MODELS,
    MOST_MEASURED,
    SET_UP_SECONDS,
    Plan,
)
from server.simulation.demo_budget import END_SECONDS, FORWARD_SPEEDUP, Budget
from shared.experiment.config import parse_experiment
from shared.planning.workload import DP_SLOWDOWN

PUBLIC = parse_experiment("[train]\nbatch=32\nsteps=100000")
PRIVATE = parse_experiment(
    '[federation]\nrounds=2\nlocal_steps=3\n[privacy]\nmechanism="dp-sgd"\nexpected_batch=100\ndraws=2\n'
    "[evaluation]\nnum_images=200\nsteps=7"
)
DP_IMAGES = DP_SLOWDOWN * 2 * 3 * 4 * 100 * 2
WORTH = 7 / FORWARD_SPEEDUP + 1
PLAN = Plan(50.0, PUBLIC, PRIVATE, num_sites=4, num_references=300)


def test_all_stages_together_take_what_is_left():
    stages = PLAN.stages(Budget(3600))
    images = 32 * (stages.start + stages.aligned + stages.alone) + DP_IMAGES + MODELS * 200 * WORTH + 300
    assert images / 50.0 == pytest.approx(3600 - SET_UP_SECONDS - AFTER_SECONDS - END_SECONDS, rel=0.01)
    assert not stages.is_over


def test_public_images_alone_get_the_compute_of_the_private_stages():
    stages = PLAN.stages(Budget(3600))
    assert 32 * (stages.alone - stages.aligned) == pytest.approx(DP_IMAGES, abs=32)
    assert stages.aligned == pytest.approx(1.5 * stages.start, abs=2)


def test_time_that_a_stage_took_too_long_is_taken_from_those_that_follow():
    planned = PLAN.stages(Budget(3600))
    rest = 3600 - SET_UP_SECONDS - planned.start * 32 / 50.0
    assert PLAN.further_stages(Budget(rest), SET_UP_SECONDS) == pytest.approx((planned.aligned, planned.alone), abs=1)
    late, _ = PLAN.further_stages(Budget(rest - 64), SET_UP_SECONDS)
    assert late == pytest.approx(planned.aligned - 64 * 50 / 2 / 32, abs=1)
    slow, alone = PLAN.further_stages(Budget(rest - 64), 1.5 * SET_UP_SECONDS)
    assert slow == pytest.approx(late - AFTER_SECONDS / 2 * 50 / 2 / 32, abs=1)
    assert 32 * (alone - slow) == pytest.approx(DP_IMAGES, abs=32)


def test_as_many_images_are_measured_as_there_is_time_for_and_enough_to_say_something():
    assert PLAN.num_measured(Budget(40 + END_SECONDS + 25), 40.0) == FEWEST_MEASURED
    seconds = (MODELS * 200 * WORTH + 300) / 50.0
    assert PLAN.num_measured(Budget(40 + END_SECONDS + seconds), 40.0) == pytest.approx(200, abs=1)
    assert PLAN.num_measured(Budget(36000), 40.0) == MOST_MEASURED


def test_a_recipe_bounds_the_stages_and_too_little_time_is_told():
    short = PUBLIC.model_copy(update={"train": PUBLIC.train.model_copy(update={"steps": 60})})
    assert Plan(500.0, short, PRIVATE, 2, 300).stages(Budget(36000)).aligned == 60
    late = PLAN.stages(Budget(90))
    assert (late.start, late.aligned, late.is_over) == (FIRST_STEPS, LEAST_ALIGNED, True)
    assert PLAN.further_stages(Budget(60), SET_UP_SECONDS)[0] == LEAST_ALIGNED
