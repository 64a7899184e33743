"""All processes of the coordinator are killed in the middle of a round, and only `maskfed-server start` is typed again.

The wanted run must resume by itself and the sites must reconnect without anybody touching them, with Flower's state in
memory (lost) as well as on disk. Before that, the ServerApp alone is killed, which the run must survive, too.
"""

import os
import signal
import sys
import time

import psutil

from benchmarks.hosts import Host, federation_on_hosts, not_measured, reason_against, rounds, wait_for
from benchmarks.local import program_of, tiny_experiment
from benchmarks.measure import without_options

MOST_SECONDS = 240.0
ROUNDS = 4


def main() -> int:
    """Measure once with Flower's state in memory, and once with it on disk."""
    if reason := reason_against():
        return not_measured(reason)
    figures = {place: lose(place) for place in ("in memory", "on disk")}
    print("; ".join(f"state {place}: {text}" for place, (text, _) in figures.items()))
    return int(not all(is_good for _, is_good in figures.values()))


def lose(place: str) -> tuple[str, bool]:
    """One federation, one run, both losses; what was seen, and whether it is good enough."""
    experiment = tiny_experiment(image_size=16, rounds=ROUNDS, local_steps=30, available_deadline_seconds=120)
    options = ("--database",) if place == "on disk" else ()
    with federation_on_hosts(experiment, *options) as (server, *_):
        server.run("maskfed-server", "finetune", "round.toml", "--init", "init", "--run", "loss", "--detach")
        in_the_middle_of_round(server, 2)
        app = kill_serverapp(server)
        wait_for(lambda: len(rounds(server, "loss")) >= 2, 300, "round 2 after the ServerApp was killed")
        after_app = time.monotonic() - app
        in_the_middle_of_round(server, 3)
        server.kill()
        begun = time.monotonic()
        server.start("maskfed-server", "start")
        wait_for(lambda: len(rounds(server, "loss")) >= 3, 300, "round 3 after the loss of the server")
        after_loss = time.monotonic() - begun
        wait_for(lambda: len(rounds(server, "loss")) == ROUNDS, 200, "the last round")
        records = rounds(server, "loss")
    everybody = all(len(record["answered"]) == 2 for record in records)
    text = (
        f"ServerApp killed, its round done {after_app:.0f} s later; server killed and started again, its round done "
        f"{after_loss:.0f} s later; {len(records)} rounds, {'both sites in each' if everybody else 'one missing'}"
    )
    print(f"{place}: {text}", flush=True)
    return text, max(after_app, after_loss) <= MOST_SECONDS and everybody and len(records) == ROUNDS


def in_the_middle_of_round(server: Host, number: int) -> None:
    """Wait until the round before is done and this one has been asked."""
    wait_for(lambda: len(rounds(server, "loss")) >= number - 1, 200, f"round {number - 1}")
    time.sleep(4)


def kill_serverapp(server: Host) -> float:
    """SIGKILL to the ServerApp; when."""
    for leader in server.processes:
        for process in psutil.Process(leader.pid).children(recursive=True):
            if program_of(process) == "flwr-serverapp":
                os.kill(process.pid, signal.SIGKILL)
    return time.monotonic()


if __name__ == "__main__":
    sys.exit(without_options(main, __doc__))
