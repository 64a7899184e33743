"""The epsilon that a recipe's comment promises is what a site would charge, and what the default policy accepts."""

import re

import pytest

from client.privacy.accounting import epsilon
from client.records.spending import Spending
from shared.experiment.config import load_experiment
from shared.experiment.recipes import FOLDER
from shared.messages.agreement.defaults import DELTA, EPSILON_CAP, MAX_STEPS, MIN_NOISE

RECIPES = sorted(FOLDER.glob("federated_private_*.toml"))
ROW = re.compile(r"^#   ([\d,]+) +([\d.]+) +([\d.]+) +([\d.]+)$", re.MULTILINE)


def test_there_is_one_for_each_shipped_scale():
    assert {path.stem.rpartition("_")[2] for path in RECIPES} == {"synthetic32-T", "faces32-T", "faces64-S"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_comment_says_what_a_site_charges(path):
    plan, rows = load_experiment(path), ROW.findall(path.read_text(encoding="utf-8"))
    assert len(rows) == 3
    federation, sigma = plan.federation, plan.privacy.noise_multiplier
    assert float(rows[0][1]) == plan.privacy.sample_rate
    for persons, rate, one, whole in rows:
        assert float(rate) * int(persons.replace(",", "")) == pytest.approx(plan.privacy.expected_batch)
        for rounds, told in ((1, one), (federation.rounds, whole)):
            charged = epsilon([Spending(sigma, float(rate), rounds * federation.local_steps)], plan.privacy.delta)
            assert float(told) == pytest.approx(charged, abs=0.006)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_default_policy_accepts_it_with_room_for_one_more_release(path):
    plan = load_experiment(path)
    federation, privacy = plan.federation, plan.privacy
    assert privacy.unit == "person"
    assert privacy.noise_multiplier >= MIN_NOISE
    assert privacy.delta <= DELTA
    assert federation.local_steps <= MAX_STEPS
    steps = Spending(privacy.noise_multiplier, privacy.sample_rate, federation.rounds * federation.local_steps)
    mean_image = Spending(3.73, 1.0, 1)
    assert epsilon([steps, mean_image], DELTA) < EPSILON_CAP
