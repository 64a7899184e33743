"""A wrong command line is one line and exit status 2, like all bad input."""

import errno
import importlib
import io
import json
import os
import pwd
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Annotated

import pytest
import typer

from shared.commandline import in_panels, owned, run_app, tell_error
from shared.errors import InputError
from shared.machine_refusals import os_error_text

ROOT = Path(__file__).parents[2]
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


@app.command()
def write(
    home: Annotated[Path | None, typer.Option("--home", callback=owned("site"))] = None,
    node_key: Annotated[Path | None, typer.Option(is_eager=True)] = None,
) -> None:
    """Fail as the machine does when a disk is full, which does not tell where."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


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
            ValueError("Exceeds the limit (4300 digits) for integer string conversion"),
            2,
            "error: Exceeds the limit (4300 digits) for integer string conversion: a number that was given, or stands "
            "in a file, is too long",
        ),
        (
            RuntimeError("Could not determine home directory."),
            2,
            "error: Could not determine home directory. set HOME, or MASKFED_CACHE and XDG_STATE_HOME",
        ),
        (
            OSError(28, "No space left on device", "/a/b"),
            2,
            "error: /a/b: No space left on device; free some space there, then run the command again",
        ),
        (OSError(27, "File too large", "a\nb\x1b[2J"), 2, "error: a b\\x1b[2J: File too large"),
        (
            OSError(5, "Input/output error", "/a"),
            1,
            "error: /a: Input/output error; the disk fails: see the kernel's log",
        ),
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


def test_a_full_disk_is_named_although_the_machine_does_not_tell_which(monkeypatch, capsys, tmp_path):
    (tmp_path / "site").mkdir()
    room = namedtuple("room", "f_bavail f_frsize f_files f_favail")
    monkeypatch.setattr(os, "statvfs", lambda path: room(0 if Path(path).name == "site" else 10**9, 4096, 10, 5))
    monkeypatch.setattr(sys, "argv", ["prog", "write", "--home", str(tmp_path / "site")])
    assert run_app(app) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {tmp_path / 'site'} (0 bytes free): No space left on device; free some space")
    assert told.count("\n") == 1


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.EROFS, errno.EMFILE, errno.EIO, errno.ENOSPC])
def test_what_the_machine_refuses_is_told_with_place_and_remedy(number):
    text = os_error_text(OSError(number, os.strerror(number), "/data/x\ny"))
    place, _, rest = text.partition(": ")
    assert place == "/data/x y"
    assert rest.startswith(f"{os.strerror(number)}; ")
    assert "\n" not in text


def test_a_current_folder_that_was_removed_is_named():
    text = os_error_text(FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)))
    assert text.startswith("the folder that this runs in: No such file or directory; ")


def test_a_command_in_another_users_folder_is_refused_with_the_line_that_works(monkeypatch, capsys, tmp_path):
    home = tmp_path / "site"
    home.mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: home.stat().st_uid + 1)
    owner, folder = pwd.getpwuid(home.stat().st_uid).pw_name, pwd.getpwuid(home.stat().st_uid).pw_dir
    monkeypatch.setattr(sys, "argv", ["/bin/prog", "write", "--home", str(home)])
    with pytest.raises(InputError, match=rf": runuser -u {owner} -- env HOME={folder} prog write --home {home}$"):
        run_app(app)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["/bin/prog", "write"])
    with pytest.raises(InputError, match="runuser"):
        run_app(app)
    # Keys of another user are root's to make, who hands them over.
    monkeypatch.setattr(sys, "argv", ["/bin/prog", "write", "--home", str(home), "--node-key", "node.key"])
    assert run_app(app) == 2
    assert "No space left" in capsys.readouterr().err


@pytest.mark.parametrize("program", ["server", "client"])
def test_every_command_with_a_home_looks_at_its_owner(program):
    group = typer.main.get_command(importlib.import_module(f"{program}.cli.main").app)
    groups, found = [group], 0
    while groups:
        for command in groups.pop().commands.values():
            groups += [command] if hasattr(command, "commands") else []
            for option in command.params:
                if "--home" in option.opts:
                    assert option.callback is not None, command.name
                    found += 1
    assert found > 10


def test_every_command_of_a_program_lies_in_one_panel_and_in_its_order():
    app, group = typer.Typer(), typer.Typer()
    for name in ("second", "first"):
        app.command(name)(lambda: None)
    app.add_typer(group, name="more")
    in_panels(app, {"Begin": ("first",), "Go on": ("second", "more")})
    assert [(each.name, each.rich_help_panel) for each in app.registered_commands] == [
        ("first", "Begin"),
        ("second", "Go on"),
    ]
    assert app.registered_groups[0].rich_help_panel == "Go on"
    with pytest.raises(AssertionError, match="more"):
        in_panels(app, {"Begin": ("first", "second")})


def test_closed_output_changes_no_exit_status(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["prog", "work", "--count", "0"])
        patch.setattr(sys, "stdout", None)
        patch.setattr(sys, "stderr", None)
        assert run_app(app) == 2
        sys.stdout.close()
        sys.stderr.close()


@app.command()
def take(
    out: Annotated[Path, typer.Option()] = Path(),
    many: Annotated[list[Path] | None, typer.Option()] = None,
    place: Annotated[Path | None, typer.Argument()] = None,
) -> None:
    """Tell which paths were understood."""
    typer.echo(json.dumps([str(out), [str(each) for each in many or ()], str(place)]))


@pytest.mark.parametrize("arguments", [["--out", ""], ["--out="], ["--many", "x", "--many", " "], [""]])
def test_an_empty_path_is_not_the_current_folder(monkeypatch, capsys, arguments):
    monkeypatch.setattr(sys, "argv", ["prog", "take", *arguments])
    assert run_app(app) == 2
    told = capsys.readouterr().err
    assert "an empty path was given" in told
    assert told.count("\n") == 1


def test_the_users_folder_is_found_where_no_shell_has_put_it_in(monkeypatch, capsys):
    monkeypatch.setenv("HOME", "/home/ann")
    monkeypatch.setattr(sys, "argv", ["prog", "take", "--out=~/x", "--many=~", "--many=./~", "~/y z"])
    assert run_app(app) == 0
    assert json.loads(capsys.readouterr().out) == ["/home/ann/x", ["/home/ann", "~"], "/home/ann/y z"]


def test_a_default_path_is_taken_as_it_is(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["prog", "take"])
    assert run_app(app) == 0
    assert json.loads(capsys.readouterr().out) == [".", [], "None"]


HELP = """
import sys
from {program}.cli.main import app
from shared import commandline
if {is_whole}:
    import rich.markdown, rich.traceback
sys.argv = ["prog", *{arguments}]
commandline.run_app(app)
loaded = {{name.partition(".")[0] for name in sys.modules}}
print("LOADED", *sorted(loaded & {{"markdown_it", "pygments", "torch", "flwr"}}))
from rich.markdown import Markdown
from rich.traceback import Traceback
assert Markdown("# a").__class__.__module__ == "rich.markdown" and Traceback.__module__ == "rich.traceback"
"""


@pytest.mark.parametrize(("program", "arguments"), [("server", ["--help"]), ("client", ["data", "scan", "-h"])])
def test_help_loads_little_and_says_the_same(program, arguments):
    told = []
    for is_whole in (False, True):
        code = HELP.format(program=program, arguments=arguments, is_whole=is_whole)
        found = subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120, cwd=ROOT
        )
        text, _, loaded = found.stdout.rpartition("LOADED")
        assert len(text) > 500
        told.append((text, loaded.split()))
    assert told[0][0] == told[1][0]
    assert told[0][1] == []
    assert told[1][1] == ["markdown_it", "pygments"]


def test_what_a_full_disk_does_not_take_of_the_output_is_told_once(monkeypatch, capsys):
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        monkeypatch.setattr(sys, "argv", ["program", "--help"])
        assert run_app(app) == 2
        full.write("and nothing is said when this is closed")
    assert capsys.readouterr().err.count("\n") == 1


def test_a_reader_that_has_seen_enough_is_no_error(monkeypatch, capsys):
    talker = typer.Typer()
    talker.command()(lambda: sys.stdout.write("much"))
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        monkeypatch.setattr(sys, "argv", ["program"])
        assert run_app(talker) == 1
    assert capsys.readouterr().err == ""
