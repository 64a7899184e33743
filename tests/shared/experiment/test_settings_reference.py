"""One source: what is printed of a setting stands where it is declared, and what is printed is a valid file."""

import json
import tomllib

import pytest

from shared.experiment.config import Experiment, parse_experiment
from shared.experiment.recipes import find_experiment, recipe_names
from shared.experiment.settings_reference import json_schema, settings, to_annotated_toml

SETTINGS = list(settings())


def test_every_setting_has_a_meaning_and_a_range():
    assert [each.key for each in SETTINGS if len(each.meaning) <= 10 or not each.range] == []


def test_every_setting_is_there_once_with_the_default_of_an_empty_file():
    expected = tomllib.loads(Experiment().to_toml())
    found = [each.key for each in SETTINGS]
    assert found == [f"{section}.{name}" for section, fields in expected.items() for name in fields]


@pytest.mark.parametrize("name", recipe_names())
def test_what_is_printed_is_the_same_experiment(name):
    experiment = parse_experiment(find_experiment(name).read_text(encoding="utf-8"))
    assert parse_experiment(to_annotated_toml(experiment)) == experiment


def test_ranges_and_choices_are_in_words():
    text = to_annotated_toml(Experiment())
    assert 'default "dp-sgd"' not in text
    assert '("none" | "dp-sgd"; default "none")' in text
    assert "(number above 0 up to 1; default 0.01)" in text
    assert "(list of number from 0 below 1; default [0.99, 0.99])" in text
    assert "below 2^63" in text


def test_the_schema_has_every_setting_with_its_meaning_and_forbids_others():
    schema = json.loads(json_schema())
    assert schema["additionalProperties"] is False
    privacy = schema["$defs"]["PrivacyConfig"]
    assert privacy["additionalProperties"] is False
    assert privacy["properties"]["sample_rate"]["maximum"] == 1
    assert all(field["description"] for field in privacy["properties"].values())
