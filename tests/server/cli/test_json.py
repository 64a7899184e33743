"""Which of the coordinator's commands print JSON, and why the others do not."""

import json

import pytest
from typer.testing import CliRunner

from server.cli.main import app
from tests.odd_words import commands

COMMANDS = {" ".join(words): command for words, command in commands(app)}
FACTS = {"status", "plan", "doctor", "sites list", "experiments list", "check", "verify", "loss", "logs", "alerts"}
ALSO = {"finetune", "stop", "sites add", "sites remove", "sites trust"}
"""Act, and say as JSON what came of it."""
FILES = {"evaluate", "audit", "release", "report", "reproduce", "train", "simulate", "align", "sample", "data cache"}
"""Their figures lie in files with a schema of their own (`result.json`, `metrics.jsonl`, `meta.json`)."""
TEXTS = {"experiments show", "experiments schema"}
"""Print a file: TOML, or a JSON schema."""
ACT = {
    "import-checkpoint",
    "export",
    "toy",
    "projection",
    "init",
    "renew",
    "start",
    "demo",
    "sites renew",
    "sites certify",
}


def test_every_command_is_one_of_these():
    groups = (FACTS, ALSO, FILES, TEXTS, ACT)
    assert set().union(*groups) == COMMANDS.keys() and sum(map(len, groups)) == len(COMMANDS)
    with_json = {name for name, each in COMMANDS.items() if any("--json" in one.opts for one in each.params)}
    assert with_json == FACTS | ALSO


def told(*words: str, exit_code: int = 0):
    done = CliRunner().invoke(app, [*words, "--json"])
    assert done.exit_code == exit_code, done.output
    return json.loads(done.stdout, parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))


def test_recipes_have_a_name_and_a_description():
    recipes = told("experiments", "list")
    assert all(each.keys() == {"name", "description"} and all(each.values()) for each in recipes)
    assert "federated_private_faces64-S" in {each["name"] for each in recipes}


def test_findings_are_booleans_and_texts(tmp_path):
    finding, *_ = told("doctor", "--home", str(tmp_path), exit_code=1)
    assert (finding["name"], finding["is_ok"]) == ("settings", False) and "coordinator.toml" in finding["text"]


def test_marks_of_pictures_are_objects_or_null(tmp_path):
    from PIL import Image

    from shared.storage.synthetic_mark import SyntheticMark, marked_png

    picture = Image.new("RGB", (8, 8))
    (tmp_path / "made.png").write_bytes(marked_png(picture, SyntheticMark("ab" * 32, "0 to 7")))
    picture.save(tmp_path / "plain.png")
    made, plain = told("check", str(tmp_path / "made.png"), str(tmp_path / "plain.png"), exit_code=3)
    assert made["mark"]["seeds"] == "0 to 7" and plain == {"file": str(tmp_path / "plain.png"), "mark": None}
