"""`python -m benchmarks.unguarded start --home FOLDER`: a coordinator with Flower's own programs, without guards.

Only to show that an attack works where its guard is off, so that a refusal elsewhere says something.
"""

import sys
from pathlib import Path

from deploy.processes import services
from server.cli import main as program

_ENTRIES = {"server.entry", "client.entry"}


def flowers_own(entry: str, *arguments: str) -> list[str]:
    """Flower's program for a guarded entry; it finds what it starts on PATH."""
    path = Path(sys.executable).parent / f"flower-{entry}"
    return [str(path), *(argument for argument in arguments if argument not in _ENTRIES)]


if __name__ == "__main__":
    services.guarded = flowers_own
    services.SETTLE_SECONDS = 1e9
    program.main()
