"""A wrong command line is one line and exit status 2, like all bad input."""

import io
import sys
from typing import Annotated

import pytest
import typer

from shared.commandline import run_app

app = typer.Typer(no_args_is_help=True)


@app.command()
def work(count: Annotated[int, typer.Option(min=1)] = 1, status: int = 0) -> None:
    """Do nothing, `count` times."""
    if status:
        raise typer.Exit(status)


@app.command()
def rest() -> None:
    """Make a group of it."""


@app.command()
def leave() -> None:
    """Ask first."""
    typer.confirm("leave?", abort=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["work", "--count", "0"], "'--count': 0 is not in the range x>=1: see `"),
        (["work", "--count", "many"], "'many' is not a valid int"),
        (["work", "--weight", "3"], "--weight"),
        (["play"], "'play': see `"),
    ],
)
def test_wrong_command_lines_are_one_line(monkeypatch, capsys, arguments, words):
    monkeypatch.setattr(sys, "argv", ["prog", *arguments])
    assert run_app(app) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert words in err


@pytest.mark.parametrize(
    ("arguments", "status"), [(["work"], 0), (["work", "--status", "3"], 3), (["--help"], 0), ([], 2)]
)
def test_status_is_the_commands_own(monkeypatch, arguments, status):
    monkeypatch.setattr(sys, "argv", ["prog", *arguments])
    assert run_app(app) == status


@pytest.mark.parametrize("answer", ["", "n\n"])
def test_a_question_that_is_not_answered_with_yes_ends_in_one_line(monkeypatch, capsys, answer):
    monkeypatch.setattr(sys, "argv", ["prog", "leave"])
    monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
    assert run_app(app) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "aborted: nothing was done"
