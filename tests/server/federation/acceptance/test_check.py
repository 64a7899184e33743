"""The process of the check, played by small scripts."""

import json
import sys

import pytest

from server.federation.acceptance import check
from server.federation.acceptance.check import Answer, CheckError, CheckQuestion, HeldOutCheck

QUESTION = CheckQuestion("checkpoint", "faces.zip", "start", {"all": 2.0}, 0.25, "replies")
ANSWERS = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
question = json.loads((folder / "question.json").read_text())
assert question == json.loads(sys.argv[2]), question
(folder / "answer.json").write_text(json.dumps({"losses": {"all": 1.5}, "suspects": ["site-2"]}))
"""


@pytest.fixture
def ask(tmp_path, monkeypatch):
    (tmp_path / "finetune.json").write_text(json.dumps({"held_out": "faces.zip"}))

    def ask(code, *arguments, attend=lambda: None):
        command = [sys.executable, "-S", "-c", code]
        monkeypatch.setattr(check, "check_command", lambda folder: [*command, str(folder), *arguments])
        return HeldOutCheck(tmp_path).ask(QUESTION, attend)

    return ask


def test_the_question_arrives_whole_and_the_answer_comes_back(ask):
    looks = []
    found = ask(ANSWERS, json.dumps(vars(QUESTION)), attend=lambda: looks.append(1))
    assert found == Answer({"all": 1.5}, ("site-2",))


def test_a_failure_carries_the_last_line_and_bad_input_is_final(ask):
    for code, is_final in ((2, True), (1, False)):
        with pytest.raises(CheckError, match=rf"exit code {code}.*error: no such images") as caught:
            ask(f"import sys; sys.stderr.write('noise\\nerror: no such images\\n'); sys.exit({code})")
        assert caught.value.is_final == is_final


def test_an_old_answer_is_not_taken_for_a_new_one(ask, tmp_path):
    (tmp_path / "held-out").mkdir()
    (tmp_path / "held-out" / "answer.json").write_text(json.dumps({"losses": {"all": 0.0}, "suspects": []}))
    with pytest.raises(CheckError, match="left no answer"):
        ask("pass")


def test_a_check_that_never_ends_is_killed(ask, monkeypatch):
    monkeypatch.setattr(check, "CHECK_SECONDS", 0.2)
    with pytest.raises(CheckError, match=r"longer than 0\.2 s") as caught:
        ask("import time; time.sleep(600)")
    assert not caught.value.is_final


def test_without_held_out_images_in_the_runs_settings_the_check_is_off(tmp_path):
    assert HeldOutCheck(tmp_path).images == ""
