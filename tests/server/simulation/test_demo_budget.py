from pathlib import Path

import pytest

from server.simulation.demo_budget import LEAST_STEPS, Budget, Speed, parse_budget, read_speed
from shared.errors import InputError
from shared.experiment.config import parse_experiment
from shared.storage.runlog import RunLog

MASKED = parse_experiment('[train]\nobjective="msm"\nsteps=100000\nbatch=32\n[mask]\nkind="patch"\nratio=0.75')
WHOLE = parse_experiment("[train]\nbatch=32\n[federation]\nlocal_steps=100000\n[evaluation]\nsteps=10\nnum_images=1000")
FAST, SLOW = Speed(masked=2000, whole=500), Speed(masked=20, whole=5)


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("8m", 480), ("1h", 3600), (" 1.5m ", 90)])
def test_budget_is_read(text: str, seconds: float):
    assert parse_budget(text).seconds == seconds


@pytest.mark.parametrize("text", ["", "8", "m", "-8m", "8 minutes", "59s", "1d"])
def test_other_budgets_are_one_line(text: str):
    with pytest.raises(InputError, match="at least 60s"):
        parse_budget(text)


def test_a_fast_machine_gets_no_more_steps_than_the_recipe_says():
    short = WHOLE.model_copy(update={"federation": WHOLE.federation.model_copy(update={"local_steps": 7})})
    assert Budget(3600).rounds(FAST, short, rounds=4, num_sites=3).local_steps == 7


def test_stages_fit_the_budget():
    budget, rounds, sites = Budget(2400), 4, 3
    steps = budget.pretraining_steps(FAST, MASKED, is_short=False)
    assert 0.4 * 2400 < steps * 32 / FAST.masked < 0.6 * 2400
    plan = budget.rounds(FAST, WHOLE, rounds, sites)
    assert rounds * plan.local_steps * 32 * sites / FAST.whole < 2400


def test_more_sites_and_rounds_get_fewer_steps_each():
    few = Budget(2400).rounds(FAST, WHOLE, rounds=2, num_sites=2).local_steps
    many = Budget(2400).rounds(FAST, WHOLE, rounds=4, num_sites=4).local_steps
    assert many < few / 3


def test_a_slow_machine_measures_only_the_first_and_the_last_model():
    plan = Budget(240).rounds(SLOW, WHOLE, rounds=4, num_sites=3)
    assert plan.evaluate_every == 4
    assert plan.local_steps == LEAST_STEPS
    assert Budget(2400).rounds(FAST, WHOLE, rounds=4, num_sites=3).evaluate_every == 1


def test_the_last_round_is_measured_whatever_the_time_allows():
    every = {
        Budget(seconds).rounds(FAST, WHOLE, rounds=4, num_sites=3).evaluate_every for seconds in range(60, 900, 20)
    }
    assert every == {1, 2, 4}


def test_speed_is_that_of_the_warm_end(tmp_path: Path):
    log = RunLog(tmp_path / "metrics.jsonl")
    for rate in (10.0, 90.0, 100.0):
        log.write("train", step=1, loss=0.5, images=16, images_per_second=rate)
    assert read_speed(tmp_path) == 100.0
