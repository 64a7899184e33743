"""Command lines of both programs: a wrong one costs one line, as all bad input does. No torch."""

import contextlib
import errno
import io
import sys

import click
import typer

# What the user cures: a path that is wrong, closed or too long, a full disk, a file that is too large.
_CURABLE = frozenset(
    {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP}
    | {errno.ENAMETOOLONG, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EINVAL, errno.ENXIO}
)

# What pathlib of Python 3.11 and 3.12 raises beside `OSError`, and the cure.
_PATHLIB = {"Symlink loop": "", "Could not determine home": " set HOME, or MASKFED_CACHE and XDG_STATE_HOME"}


def run_app(app: typer.Typer) -> int:
    """Run the command that `sys.argv` names.

    Returns:
        Its exit status; 2 for a wrong command line (told in one line), for a group without a command (its help), and
        for a file or folder that cannot be used (one line); 1 for other failures of the machine, and where a question
        was answered with no, or its input ended.
    """
    for stream in (sys.stdout, sys.stderr):
        # Names of files may hold bytes that are no text.
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(ValueError):
                stream.reconfigure(errors="backslashreplace")
    try:
        status = app(standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        sys.stderr.write(error.format_message())
        return error.exit_code
    except click.Abort:
        sys.stderr.write("aborted: nothing was done\n")
        return 1
    except (click.UsageError, OSError, RuntimeError, MemoryError) as error:
        text, status = _told(error)
        if not text:
            raise
        tell_error(text)
    return status if isinstance(status, int) else 0


def _told(error: click.UsageError | OSError | RuntimeError | MemoryError) -> tuple[str, int]:
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
    cures = [cure for start, cure in _PATHLIB.items() if str(error).startswith(start)]
    return " ".join(f"{error}{cures[0]}".split()) if cures else "", 2


def tell_error(error: BaseException | str) -> None:
    """One line on standard error; what would break it or move the cursor is shown as its code."""
    shown = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in str(error))
    sys.stderr.write(f"error: {shown}\n")


def os_error_text(error: OSError) -> str:
    """One line of what the machine refused, and where."""
    places = " and ".join(str(place) for place in (error.filename, error.filename2) if place is not None)
    text = f"{places}: {error.strerror}" if places and error.strerror else error.strerror or str(error)
    return " ".join(text.split())
