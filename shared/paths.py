"""Paths as people and environments give them. No torch."""

import os
import pwd
from pathlib import Path

from shared.errors import InputError


def given_path(text: str) -> str:
    """A path as it was given; `~` is the user's folder also where no shell has put it in, as in `--out=~/x`.

    Raises:
        InputError: nothing was given. Python would take the current folder for it, and a variable of the shell that is
            not set leaves nothing.
    """
    if not text.strip():
        raise InputError("an empty path was given: give one, or . for the current folder")
    try:
        return str(Path(text).expanduser()) if text.startswith("~") else text
    except RuntimeError:  # a name such as ~nobody-of-here
        return text


def path_variable(name: str) -> str:
    """The path in a variable of the environment; empty where it is not set or empty."""
    text = os.environ.get(name, "").strip()
    return given_path(text) if text else ""


def user_folder(variable: str, *default: str) -> Path:
    """A folder of this user by its variable of the XDG base directory specification, else below the user's own.

    A relative path there or in HOME is ignored, as the specification asks: it would be another folder wherever a
    command runs.
    """
    named, home = Path(os.environ.get(variable, "")), Path.home()
    if not home.is_absolute():
        home = Path(pwd.getpwuid(os.getuid()).pw_dir)
    return named if named.is_absolute() else home.joinpath(*default)
