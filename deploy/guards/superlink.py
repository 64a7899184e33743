"""The SuperLink behind its guard: `python -I -m deploy.guards.superlink ...` with `flower-superlink`'s arguments.

Flower builds its web application and hands it to uvicorn; here it is put behind `asgi.Guard` first. Where the
ServerApp writes allowances is in the environment; a simulation has no nodes and thus none.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

import flwr.superlink.main as application
from flwr.superlink.cli import flower_superlink

from deploy.errors import ProvisionError
from deploy.guards import replace
from deploy.guards.web.asgi import Guard
from deploy.guards.web.calls import caller_value
from deploy.guards.web.connections import close_the_silent
from deploy.guards.web.direct import Direct, fleet_work, runtime_work
from deploy.guards.web.held_questions import HeldQuestions
from deploy.guards.web.pushes import AllowanceFiles, NodePushes
from deploy.processes.memory_limits import limit_own_memory

ALLOWANCES_VARIABLE = "MASKFED_ALLOWANCES"
KEPT_SECONDS = 7 * 86400.0


def main() -> None:
    """Put the guard in place and run the SuperLink."""
    os.umask(0o077)
    try:
        limit_own_memory("superlink")
        value = caller_value(Path(sys.argv[sys.argv.index("--superexec-auth-secret-file") + 1]))
    except (ProvisionError, ValueError) as error:
        sys.exit(f"error: the SuperLink does not start: {error}")
    allowances = Path(os.environ[ALLOWANCES_VARIABLE])
    forget_old(allowances)
    install(value, allowances)
    close_the_silent()
    sys.argv[0] = "flower-superlink"
    flower_superlink()


def forget_old(allowances: Path) -> None:
    """Remove the files of runs that nobody has written to for a week."""
    for file in allowances.glob("*.jsonl"):
        if file.stat().st_mtime < time.time() - KEPT_SECONDS:
            file.unlink(missing_ok=True)


def install(value: str, allowances: Path) -> None:
    """Let Flower's factory of web applications give guarded ones."""
    create = application.create_app

    def guarded(*args: Any, **kwargs: Any) -> Guard:  # noqa: ANN401 - Flower's own arguments
        app = create(*args, **kwargs)
        held = HeldQuestions()
        short = Direct(app, {**fleet_work(app), **runtime_work(app, "SuperLink", held=held)}, held)
        return Guard(short, value, NodePushes(app.state.linkstate_factory, AllowanceFiles(allowances)))

    replace(application, {"create_app": guarded})


if __name__ == "__main__":
    main()
