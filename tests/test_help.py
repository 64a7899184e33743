"""Every command and argument of both programs is explained, and a default that is told is the true one."""

import re
from collections.abc import Iterator

import pytest

from client.cli.main import app as client_app
from server.cli.main import app as server_app
from tests.odd_words import commands

PROGRAMS = {"server": server_app, "client": client_app}


def problems(program: str) -> Iterator[str]:
    for words, command in commands(PROGRAMS[program]):
        if not command.help:
            yield f"{' '.join(words)}: no help"
        for parameter in command.params:
            name, text = f"{' '.join(words)} {parameter.name}", getattr(parameter, "help", None) or ""
            has_value = parameter.default not in (None, "", False, (), [])
            if not text.rstrip().endswith("."):
                yield f"{name}: {text!r} is no sentence"
            if has_value and re.search(r"[Dd]efault: ", text):
                yield f"{name}: {text!r}, but the default is {parameter.default!r}"
            if has_value and parameter.param_type_name == "option" and parameter.show_default is False:
                yield f"{name}: the default {parameter.default!r} is not shown"


@pytest.mark.parametrize(("program", "at_least"), [("server", 150), ("client", 80)])
def test_arguments_are_sentences_and_defaults_are_shown_once(program, at_least):
    assert sum(len(command.params) for _, command in commands(PROGRAMS[program])) > at_least
    assert list(problems(program)) == []
