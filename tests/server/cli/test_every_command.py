"""Whatever stands in any argument of any command: one line and an exit code, never a traceback, nothing half-made."""

import pytest

from server.cli import main as cli
from tests.odd_words import check_command, commands

COMMANDS = dict(commands(cli.app))
USUAL = {
    "--home": "nowhere",
    "--extractor": "onnx:nowhere",
    "--reference": "nowhere",
    "demo --faces": "nowhere",
    "demo --budget": "60s",
    "--size": "16",
    "name": "nowhere",
}


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_odd_words_are_one_line(words, tmp_path, monkeypatch):
    place = tmp_path / "a" / "b" / "c"
    place.mkdir(parents=True)
    monkeypatch.chdir(place)
    monkeypatch.setenv("MASKFED_CACHE", str(place / "cache"))
    check_command(cli.main, "maskfed-server", words, COMMANDS[words], USUAL, tmp_path)


def test_every_argument_and_option_is_explained():
    told = [(words, each) for words, command in COMMANDS.items() for each in command.params if each.name != "help"]
    assert len(told) > len(COMMANDS)
    assert [(words, each.name) for words, each in told if not getattr(each, "help", None)] == []
