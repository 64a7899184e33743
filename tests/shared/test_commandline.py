"""A wrong command line is one line and exit status 2, like all bad input."""

import io
import sys
from typing import Annotated

import pytest
import typer

from shared.commandline import run_app, tell_error

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


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (RecursionError("maximum"), 2, "error: a file that was given nests too deeply to be read: give another"),
        (MemoryError(), 1, "error: not enough memory for what was asked: ask for less, or give the machine more"),
        (RuntimeError("Symlink loop from 'a'"), 2, "error: Symlink loop from 'a'"),
        (
            RuntimeError("Could not determine home directory."),
            2,
            "error: Could not determine home directory. set HOME, or MASKFED_CACHE and XDG_STATE_HOME",
        ),
        (OSError(28, "No space left on device", "/a/b"), 2, "error: /a/b: No space left on device"),
        (OSError(27, "File too large", "a\nb\x1b[2J"), 2, "error: a b\\x1b[2J: File too large"),
        (OSError(5, "Input/output error", "/a"), 1, "error: /a: Input/output error"),
    ],
)
def test_what_the_machine_refuses_is_one_line(monkeypatch, capsys, error, status, line):
    def fail():
        raise error

    failing = typer.Typer()
    failing.command()(fail)
    monkeypatch.setattr(sys, "argv", ["prog"])
    assert run_app(failing) == status
    assert capsys.readouterr().err == f"{line}\n"


def test_a_programmers_error_is_no_line(monkeypatch):
    def fail():
        raise RuntimeError("dictionary changed size during iteration")

    failing = typer.Typer()
    failing.command()(fail)
    monkeypatch.setattr(sys, "argv", ["prog"])
    with pytest.raises(RuntimeError, match="dictionary"):
        run_app(failing)


def test_a_line_shows_what_would_break_it(capsys):
    tell_error(ValueError("bundle a\nb\x1b[31m\udcff: é"))
    assert capsys.readouterr().err == "error: bundle a\\nb\\x1b[31m\\udcff: é\n"
