"""How much memory each process may take, from the size of the largest model: limits that the kernel keeps.

`python -m deploy.processes.memory_limits PARAMETERS [--units FOLDER]` prints or (for systemd) writes them for a model.
The processes without torch limit their own address space when they start, so that what a member makes them hold ends
in a refused call and not in the loss of the machine. Torch and CUDA reserve far more addresses than they use: a
ClientApp watches its resident memory itself.
"""

import argparse
import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

from deploy.errors import ProvisionError

PARAMETERS_VARIABLE = "MASKFED_PARAMETERS"
DEFAULT_PARAMETERS = 300e6
"""What a site's policy allows at most unless it says otherwise."""
BYTES_PER_PARAMETER = 4
SPARE_BYTES = 4 * 2**30
"""Addresses that are reserved and not used: thread stacks, allocator arenas, libraries."""


@dataclass(frozen=True)
class Need:
    """Bytes of a process without any model, and how many times the largest model it may hold."""

    base_bytes: int
    models: int

    def of(self, parameters: float) -> int:
        """Bytes for a model of so many float32 values."""
        return self.base_bytes + int(self.models * parameters * BYTES_PER_PARAMETER)


NEEDS = {
    # The question, and 16 answers that wait to be fetched, each twice while it arrives.
    "superlink": Need(2**30, 36),
    "serverapp": Need(2**29, 12),
    # A question and an answer, each also in pieces; an audit's question carries up to five models.
    "supernode": Need(2**30, 16),
    "superexec": Need(2**29, 0),
    "nginx": Need(2**29, 0),
    "page": Need(2**28, 0),
    "clientapp": Need(4 * 2**30, 16),
}
"""By process; measured peaks for 44 and 232 million parameters stand in benchmarks/BENCHMARKS.md, row `wire`."""
UNITS = {
    "maskfed-server": ("superlink", "serverapp", "superexec", "nginx", "page"),
    "maskfed-node": ("supernode",),
    "maskfed-site": ("superexec", "clientapp", "page"),
}
CONTAINERS = {"server": UNITS["maskfed-server"], "site": (*UNITS["maskfed-node"], *UNITS["maskfed-site"])}


def parameters() -> float:
    """Size of the largest model, from the environment or the default.

    Raises:
        ProvisionError: the variable is no number from 1 to 1e12.
    """
    text = os.environ.get(PARAMETERS_VARIABLE, "")
    try:
        value = float(text) if text else DEFAULT_PARAMETERS
    except ValueError:
        value = 0.0
    if not 1 <= value <= 1e12:
        raise ProvisionError(f"{PARAMETERS_VARIABLE}={text}: give the number of parameters, for example 233e6")
    return value


def limit_own_memory(process: str) -> None:
    """Limit the address space of this process; one that is stricter already stays.

    Only the soft limit is set, so that a superexec's tasks can take what they need themselves.
    """
    _limit(NEEDS[process].of(parameters()) + SPARE_BYTES)


def lift_own_limit() -> None:
    """Take back what was inherited: for tasks with torch, whose memory is watched instead."""
    _limit(resource.RLIM_INFINITY)


def _limit(wanted: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    within = (
        hard if wanted == resource.RLIM_INFINITY else wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    )
    resource.setrlimit(resource.RLIMIT_AS, (within, hard))


def unit_bytes(processes: tuple[str, ...], model: float) -> int:
    """What the processes of a unit or container need together."""
    return sum(NEEDS[process].of(model) for process in processes)


def drop_in(unit: str, model: float) -> str:
    """Drop-in for a unit of systemd: its limit, and the size that its processes derive theirs from."""
    megabytes = -(-unit_bytes(UNITS[unit], model) // 2**20)
    return f"[Service]\nMemoryMax={megabytes}M\nEnvironment={PARAMETERS_VARIABLE}={model:.0f}\n"


def main(arguments: list[str]) -> int:
    """Print the limits; write drop-ins when asked to."""
    parser = argparse.ArgumentParser(prog="python -m deploy.processes.memory_limits", description=__doc__)
    parser.add_argument("parameters", type=float, nargs="?", default=DEFAULT_PARAMETERS)
    parser.add_argument("--units", type=Path, help="write UNIT.service.d/memory.conf below this folder")
    options = parser.parse_args(arguments)
    if not 1 <= options.parameters <= 1e12:
        parser.error(f"{options.parameters:g} parameters: give 1 to 1e12")
    out = sys.stdout.write
    for process, need in NEEDS.items():
        out(f"{process:10s} {need.of(options.parameters) / 2**30:7.1f} GiB\n")
    for name, processes in CONTAINERS.items():
        gib = -(-unit_bytes(processes, options.parameters) // 2**30)
        out(f"container {name}: MASKFED_MEMORY={gib}g {PARAMETERS_VARIABLE}={options.parameters:.0f}\n")
    for unit in UNITS if options.units else ():
        folder = options.units / f"{unit}.service.d"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.conf").write_text(drop_in(unit, options.parameters), encoding="ascii")
        out(f"written: {folder / 'memory.conf'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
