"""The coordinator's plan names what default policies refuse; the numbers follow from public constants."""

import json

import pytest
from typer.testing import CliRunner

from server.cli.main import app
from server.planning.plan_cost import default_refusals, epsilon_after
from shared.experiment.config import parse_experiment
from shared.experiment.recipes import FOLDER

PRIVATE = "[privacy]\nmechanism = 'dp-sgd'\nunit = 'person'\nnoise_multiplier = 0.9\nsample_rate = 0.2\n"
PRIVATE += "[federation]\nrounds = 2\nlocal_steps = 7\n"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("privacy.mechanism='none'", ["no DP"]),
        ("privacy.noise_multiplier=0.4", ["noise multiplier 0.4 is below 0.5", "of one round is above the cap 8"]),
        ("privacy.delta=1e-4", ["delta 0.0001 is above 1e-05"]),
        ("federation.local_steps=2001", ["2001 steps", "above the cap"]),
        ("federation.rounds=5", ["of all 5 rounds: the cap 8 ends the plan early"]),
        ("model.backbone='unet'", ["backbone 'uvit'"]),
        ("train.seed=1", []),
    ],
)
def test_what_default_policies_refuse_is_named_all_at_once(override, words):
    found = default_refusals(parse_experiment(PRIVATE, [override]))
    assert len(found) == len(words)
    assert all(word in text for word, text in zip(words, found, strict=True))


def test_without_dp_there_is_no_epsilon():
    assert epsilon_after(parse_experiment(""), 3) is None


def test_private_recipes_are_not_refused_by_default():
    for file in FOLDER.glob("federated_private_*.toml"):
        assert default_refusals(parse_experiment(file.read_text(encoding="utf-8"))) == []


def test_the_command_says_it_in_numbers(tmp_path):
    file = tmp_path / "plan.toml"
    file.write_text(PRIVATE + "[model]\nimage_size = 16\npatch_size = 8\n")
    arguments = ["plan", str(file), "--sites", "3", "--units-per-site", "1000", "--probe-seconds", "0.1"]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0
    told = json.loads(result.output)
    assert told["epsilon_round"] == pytest.approx(epsilon_after(parse_experiment(PRIVATE), 1))
    assert told["units_per_step"] == pytest.approx(200)
    assert told["images_per_round"] == pytest.approx(1400)
    assert told["default_refusals"] == []
    text = CliRunner().invoke(app, arguments).output
    assert "epsilon per person at delta 1e-05" in text
    assert "averaged over 3 sites" in text
    text = CliRunner().invoke(app, [*arguments, "--set", "privacy.mechanism='none'"]).output
    assert "sites with the default policy refuse: it has no DP" in text and "secure sums" not in text
    text = CliRunner().invoke(app, [*arguments, "--set", "federation.secure=true"]).output
    assert "secure sums of 3 sites: each takes 2 answers, so a round stands 1 that drop out" in text
