"""From clean folders on three hosts to the first round: how many commands, how long.

Server and two sites are network namespaces; sites reach only nginx. Images and the checkpoint to start from lie there
before, as they would. The clock runs from the first command to the end of round 1, without the seconds of training.
"""

import sys
import time

from benchmarks.hosts import Host, not_measured, prepared_hosts, reason_against, rounds, set_up
from benchmarks.local import tiny_experiment
from benchmarks.measure import without_options

MOST_COMMANDS, MOST_SECONDS = 8, 180.0


def main() -> int:
    """Measure once."""
    if reason := reason_against():
        return not_measured(reason)
    with prepared_hosts(tiny_experiment(image_size=16, available_deadline_seconds=120)) as machines:
        commands, seconds, training = bring_up(*machines)
    print(
        f"{commands} commands, {seconds:.0f} s from nothing to the end of round 1 besides {training:.0f} s of training"
    )
    return int(commands > MOST_COMMANDS or seconds > MOST_SECONDS)


def bring_up(server: Host, *sites: Host) -> tuple[int, float, float]:
    """Set everything up by the operators' commands; commands, seconds without training, seconds of training."""
    begun = time.monotonic()
    commands = set_up(server, *sites)
    server.run("maskfed-server", "finetune", "round.toml", "--init", "init", "--run", "first")
    seconds = time.monotonic() - begun
    (record,) = rounds(server, "first")
    training = max(reply["scalars"]["seconds"] for reply in record["answered"])
    return commands + 1, seconds - training, training


if __name__ == "__main__":
    sys.exit(without_options(main, __doc__))
