"""Command lines of both programs: a wrong one costs one line, as all bad input does. No torch."""

import sys

import click
import typer


def run_app(app: typer.Typer) -> int:
    """Run the command that `sys.argv` names.

    Returns:
        Its exit status; 2 for a wrong command line (told in one line) and for a group without a command (its help);
        1 where a question was answered with no, or its input ended.
    """
    try:
        status = app(standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        sys.stderr.write(error.format_message())
        return error.exit_code
    except click.UsageError as error:
        told = " ".join(error.format_message().split()).rstrip(".")
        where = f": see `{error.ctx.command_path} --help`" if error.ctx else ""
        sys.stderr.write(f"error: {told}{where}\n")
        return error.exit_code
    except click.Abort:
        sys.stderr.write("aborted: nothing was done\n")
        return 1
    return status if isinstance(status, int) else 0
