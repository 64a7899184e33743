"""The process of one task: `python -I -m deploy.guards.apps MODULE ...` runs the installed MODULE and nothing else.

Two lines come through a pipe, the token of the task and the value that goes with every call: neither is ever on a
command line, where every user of the machine could read it. With `--verify` instead, the process says which file
MODULE would run from, and ends.
"""

import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from types import ModuleType

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"

VERIFY = "--verify"
LIMITED = {"server.entry": "serverapp"}
"""Tasks without torch, whose address space is limited; the others watch their memory themselves."""
UNUSED = {"server.entry": {"flwr.superlink.grid.inmemory_grid": "InMemoryGrid"}}
"""Parts of Flower, with the name that is asked of each, that load its whole server with SQLAlchemy and that the task
never uses: 36 MB, and a third of what its start costs."""
_TOKEN = re.compile(r"[\w.+/=-]{16,512}")


def main() -> None:
    """Say where the module lies, or run it."""
    module = sys.argv[1]
    if sys.argv[2:] == [VERIFY]:
        sys.exit(0 if (file := file_of(module)) and print(file) is None else 1)  # noqa: T201 - the answer
    run(module, sys.argv[2:])


def file_of(module: str) -> str | None:
    """The file that a module would be loaded from; None: there is no such module."""
    found = importlib.util.find_spec(module)
    return found.origin if found else None


def run(module: str, arguments: Sequence[str]) -> None:
    """Read what the pipe holds, put the guards in place, run the module's `main`.

    Raises:
        SystemExit: the pipe does not hold a task, or the task has ended.
    """
    token, value = read_pipe()

    from deploy.processes.memory import lift_own_limit, limit_own_memory

    # What was inherited is the superexec's own limit.
    lift_own_limit()
    if module in LIMITED:
        limit_own_memory(LIMITED[module])

    from deploy.guards.sizes import check_before_inflating
    from deploy.guards.web.calls import look_again_soon, send_with_every_call

    send_with_every_call(value)
    look_again_soon()
    check_before_inflating()
    leave_out(module)
    sys.argv = [module, *arguments, "--token", token]
    importlib.import_module(module).main()


def leave_out(module: str) -> None:
    """Put something empty in the place of what the task never uses, before it would be loaded."""
    for name, asked in UNUSED.get(module, {}).items():
        empty = ModuleType(name)
        setattr(empty, asked, None)
        sys.modules[name] = empty


def read_pipe() -> tuple[str, str]:
    """Token and value from standard input, which is closed then.

    Raises:
        SystemExit: it does not hold exactly these two lines.
    """
    lines = sys.stdin.buffer.read(4096).decode("ascii", "replace").splitlines()
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    if len(lines) != 2 or not all(_TOKEN.fullmatch(line) for line in lines):
        sys.exit("standard input does not hold a task's token: a superexec of maskfed starts this process")
    return lines[0], lines[1]


if __name__ == "__main__":
    main()
