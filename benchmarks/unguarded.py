"""`python -m benchmarks.unguarded start --home FOLDER`: a coordinator with Flower's own programs, without guards.

Only to show that an attack works where its guard is off, so that a refusal elsewhere says something: SuperLink and
superexec are Flower's, the ServerApp asks nobody who signed an answer nor whether it answers the question.
"""

import sys
from pathlib import Path

from deploy.processes import services
from server.cli import main as program
from server.federation.messaging import exchange, signed_grid

ENTRIES = {"server.entry", "client.entry"}
SCRIPT = """#!{python}
import sys
sys.path.insert(0, {root!r})
from benchmarks.unguarded import serverapp
serverapp()
"""


def main(home: Path) -> None:
    """The coordinator's command line, with every guard left out."""
    environment = services.environment
    programs = write_serverapp(home.parent / "unguarded")

    def with_own_serverapp(*args: object) -> dict[str, str]:
        made = environment(*args)  # type: ignore[arg-type]
        return made | {"PATH": f"{programs}:{made['PATH']}"}

    services.guarded = flowers_own
    services.environment = with_own_serverapp
    services.SETTLE_SECONDS = 1e9  # Flower's superexec shows no sign of life
    program.main()


def flowers_own(entry: str, *arguments: str) -> list[str]:
    """Flower's program for a guarded entry; it finds what it starts on PATH."""
    path = Path(sys.executable).parent / f"flower-{entry}"
    return [str(path), *(argument for argument in arguments if argument not in ENTRIES)]


def write_serverapp(folder: Path) -> Path:
    """A folder for the head of PATH, with a `flwr-serverapp` that calls `serverapp`."""
    folder.mkdir(exist_ok=True)
    script = folder / "flwr-serverapp"
    script.write_text(SCRIPT.format(python=sys.executable, root=str(Path(__file__).parent.parent)), encoding="utf-8")
    script.chmod(0o755)
    return folder


def serverapp() -> None:
    """Flower's own process of a run, in which whatever comes in counts as what was asked for."""
    from flwr.superlink.cli import flwr_serverapp

    exchange.forgery = lambda *_: ""
    signed_grid.SignedGrid.forgery = lambda *_: ""  # type: ignore[method-assign]
    flwr_serverapp()


if __name__ == "__main__":
    main(Path(sys.argv[sys.argv.index("--home") + 1]))
