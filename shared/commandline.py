"""Command lines of both programs: a wrong one costs one line, as all bad input does. No torch."""

import contextlib
import errno
import io
import json
import math
import os
import pwd
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, TextIO

import click
import typer
from click.shell_completion import CompletionItem
from typer.models import CommandInfo, TyperInfo

from shared.errors import InputError
from shared.help_screen import load_help
from shared.machine_refusals import is_output_lost, os_error_text
from shared.paths import given_path

# What the user cures: a path that is wrong, closed or too long, a full disk, a file that is too large.
_CURABLE = frozenset(
    {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP}
    | {errno.ENAMETOOLONG, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EINVAL, errno.ENXIO}
)

# What Python raises beside `OSError` of paths and numbers that were given, and the cure.
_OF_PYTHON = {
    "Symlink loop": "",
    "Could not determine home": " set HOME, or MASKFED_CACHE and XDG_STATE_HOME",
    "Exceeds the limit": ": a number that was given, or stands in a file, is too long",
}


JsonOption = Annotated[bool, typer.Option("--json", help="Print as JSON.")]
"""Of every command that prints facts."""


def tell_json(value: object) -> None:
    """Print facts as JSON: numbers as numbers, what is not finite as null."""
    typer.echo(json.dumps(_finite(value), indent=1, allow_nan=False))


def _finite(value: object) -> object:
    match value:
        case float() if not math.isfinite(value):
            return None
        case dict():
            return {str(key): _finite(each) for key, each in value.items()}
        case list() | tuple():
            return [_finite(each) for each in value]
    return value


def new_program(text: str | None) -> typer.Typer:
    """A program to add commands to: `-h`, `--version`, completion for shells, and `text` at the head of its help."""
    settings = {"help_option_names": ["-h", "--help"]}
    app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=text, context_settings=settings)

    @app.callback()
    def program(
        *,
        _version: Annotated[
            bool,
            typer.Option("--version", is_eager=True, callback=_tell_version, help="Print version and commit."),
        ] = False,
    ) -> None: ...

    return app


def in_panels(app: typer.Typer, panels: Mapping[str, Sequence[str]]) -> None:
    """Show the commands of a program in panels, and in this order, in its help.

    Args:
        app: with all its commands and groups.
        panels: names of commands and groups by panel; each exactly once.
    """
    place = {name: (number, panel) for number, (panel, name) in enumerate((p, n) for p in panels for n in panels[p])}
    found: dict[str, CommandInfo | TyperInfo] = {}
    registered: list[CommandInfo | TyperInfo] = [*app.registered_commands, *app.registered_groups]
    for each in registered:
        called = each.name or (each.callback.__name__.replace("_", "-") if each.callback else "")
        found[str(called)] = each
    assert found.keys() == place.keys(), found.keys() ^ place.keys()
    for name, each in found.items():
        each.rich_help_panel = place[name][1]
    order = {id(each): place[name][0] for name, each in found.items()}
    app.registered_commands.sort(key=lambda each: order[id(each)])
    app.registered_groups.sort(key=lambda each: order[id(each)])


def _tell_version(is_asked: bool) -> None:
    if is_asked:
        from shared.storage.versions import git_commit, installed_versions

        commit = git_commit()
        typer.echo(f"maskfed {installed_versions()['maskfed']}" + (f", commit {commit}" if commit else ""))
        raise typer.Exit


def run_app(app: typer.Typer) -> int:
    """Run the command that `sys.argv` names.

    Returns:
        Its exit status; 2 for a wrong command line (told in one line), for a group without a command (its help), and
        for a file or folder that cannot be used (one line); 1 for other failures of the machine, and where a question
        was answered with no, or its input ended.
    """
    # A caller may have closed them: what is told goes nowhere then, and the exit status is the same.
    sys.stdout, sys.stderr = sys.stdout or _nowhere(), sys.stderr or _nowhere()
    for stream in (sys.stdout, sys.stderr):
        # Names of files may hold bytes that are no text.
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(ValueError):
                stream.reconfigure(errors="backslashreplace")
    command = typer.main.get_command(app)
    _take_given_paths(command)
    if {"-h", "--help"} & set(sys.argv) or len(sys.argv) == 1:
        load_help()
    try:
        status = command(standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.NoArgsIsHelpError as error:
        sys.stderr.write(error.format_message())
        return error.exit_code
    except click.Abort:
        sys.stderr.write("aborted: nothing was done\n")
        return 1
    except (click.UsageError, OSError, RuntimeError, MemoryError, ValueError) as error:
        if is_output_lost() and isinstance(error, BrokenPipeError):
            return 1  # whoever read has seen enough, as `head` does
        text, status = _told(error)
        if not text:
            raise
        tell_error(text)
    finally:
        is_output_lost()
    return status if isinstance(status, int) else 0


def _take_given_paths(command: click.Command) -> None:
    """Read every path of a program's commands by `given_path`, before the library looks at it."""
    for each in command.params:
        if isinstance(each.type, click.Path):
            each.type = _GivenPath(each.type)
    for part in command.commands.values() if isinstance(command, click.Group) else ():
        _take_given_paths(part)


class _GivenPath(click.ParamType):  # type: ignore[type-arg]  # not generic in older versions
    def __init__(self, kind: click.Path) -> None:
        self.name, self._kind = kind.name, kind

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> object:
        try:
            given = given_path(value) if isinstance(value, str) else value
        except InputError as error:
            self.fail(str(error), param, ctx)
        return self._kind.convert(given, param, ctx)  # type: ignore[arg-type]  # as click would call it

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return self._kind.shell_complete(ctx, param, incomplete)


def _nowhere() -> TextIO:
    """Takes what is written, for the rest of the process."""
    return Path(os.devnull).open("w", encoding="utf-8")


def _told(error: click.UsageError | OSError | RuntimeError | MemoryError | ValueError) -> tuple[str, int]:
    """What to say of a failure, and the exit status; an empty text for a programmer's error."""
    match error:
        case click.UsageError():
            where = f": see `{error.ctx.command_path} --help`" if error.ctx else ""
            return " ".join(error.format_message().split()).rstrip(".") + where, error.exit_code
        case OSError():
            # Without a number it is of a library that could not read what it was given.
            return os_error_text(error), 2 if error.errno is None or error.errno in _CURABLE else 1
        case MemoryError():
            return "not enough memory for what was asked: ask for less, or give the machine more", 1
        case RecursionError():
            return "a file that was given nests too deeply to be read: give another", 2
    cures = [cure for start, cure in _OF_PYTHON.items() if str(error).startswith(start)]
    return " ".join(f"{error}{cures[0]}".split()) if cures else "", 2


def tell_error(error: BaseException | str) -> None:
    """One line on standard error; what would break it or move the cursor is shown as its code."""
    shown = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in str(error))
    sys.stderr.write(f"error: {shown}\n")


def owned(default: str | None = None) -> Callable[[typer.Context, Path | None], Path | None]:
    """Callback of the option `--home`: a command that another user than the folder's owner runs is refused.

    What he wrote there would belong to him, and the owner's own processes could not go on with it.

    Args:
        default: folder that the command takes when none is given.

    Raises:
        InputError: by the callback, with the line that runs the command as the owner. Commands that give a key with
            `--node-key` are for root, who hands over what he writes.
    """

    def check(context: typer.Context, home: Path | None) -> Path | None:
        place = home or (Path(default) if default else None)
        if place is not None and place.exists() and not context.params.get("node_key"):
            check_owner(place)
        return home

    return check


def check_owner(folder: Path) -> None:
    """Refuse a folder of another user.

    Raises:
        InputError: with the line that runs this command as its owner.
    """
    owner = folder.stat().st_uid
    if owner == os.geteuid():
        return
    try:
        user = pwd.getpwuid(owner)
        # The other user's own folders: `runuser` leaves HOME as it is.
        name, way = user.pw_name, f"runuser -u {user.pw_name} -- env HOME={shlex.quote(user.pw_dir)}"
    except KeyError:
        name, way = f"user {owner}", f"setpriv --reuid={owner} --clear-groups --"
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    raise InputError(f"{folder} belongs to {name}, who could not go on with files of another user: {way} {command}")
