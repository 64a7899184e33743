"""The SuperNode behind its guard: `python -I -m deploy.guards.supernode ...` with `flower-supernode`'s arguments.

Its own port has runtime paths only, for the site's superexec and its processes; they show the site's secret value.
Where no supervisor of ours stands above it, `--health-server-address` is answered here and not by Flower.
"""

import contextlib
import os
import sys
from itertools import pairwise
from pathlib import Path

import flwr.supernode.main as application
from flwr.supernode.cli import flower_supernode

from deploy.guards import replace
from deploy.guards.asgi import Guard
from deploy.guards.calls import caller_value
from deploy.identity.keys import ProvisionError
from deploy.observe.health import serve_health
from deploy.processes.memory import limit_own_memory
from deploy.processes.services import is_listening

HEALTH_OPTION = "--health-server-address"


def main() -> None:
    """Put the guard in place and run the SuperNode."""
    os.umask(0o077)
    try:
        limit_own_memory("supernode")
        value = caller_value(Path(sys.argv[sys.argv.index("--superexec-auth-secret-file") + 1]))
    except (ProvisionError, ValueError) as error:
        sys.exit(f"error: the SuperNode does not start: {error}")
    install(value)
    sys.argv[0] = "flower-supernode"
    with own_health(sys.argv):
        flower_supernode()


def own_health(argv: list[str]) -> contextlib.AbstractContextManager[None]:
    """Take the option of the health check out of `argv` and answer it; the SuperNode is well when its port answers."""
    if HEALTH_OPTION not in argv:
        return contextlib.nullcontext()
    address = argv.pop(argv.index(HEALTH_OPTION) + 1)
    argv.remove(HEALTH_OPTION)
    given = dict(pairwise(argv))
    runtime, authority = f"{given['--host']}:{given['--port']}", Path(given["--ssl-ca-certfile"])
    return serve_health(address, lambda: {"supernode": is_listening(runtime, authority)})


def install(value: str) -> None:
    """Let Flower's factory of web applications give guarded ones."""
    create = application.create_app
    replace(application, {"create_app": lambda *args, **kwargs: Guard(create(*args, **kwargs), value)})


if __name__ == "__main__":
    main()
