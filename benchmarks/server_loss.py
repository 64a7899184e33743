"""All processes of the coordinator are killed in the middle of a round, and only `maskfed-server start` is typed again.

The wanted run must resume by itself and the sites must reconnect without anybody touching them, with Flower's state in
memory (lost) as well as on disk. Before that, the ServerApp alone is killed, which the run must survive, too.
"""

import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import psutil

from benchmarks.bring_up import EXPERIMENT, prepare, rounds, set_up
from benchmarks.hosts import Host, hosts, not_measured, reason_against, wait_for
from benchmarks.local import program_of

MOST_SECONDS = 240.0
LONGER = EXPERIMENT.replace("rounds = 1", "rounds = 4").replace("local_steps = 5", "local_steps = 30")


def main() -> int:
    """Measure once."""
    if reason := reason_against():
        return not_measured(reason)
    with tempfile.TemporaryDirectory(prefix="maskfed-") as folder, hosts(Path(folder), ("s", "a", "b")) as machines:
        server, *sites = machines
        prepare(server, tuple(sites), LONGER)
        set_up(server, *sites)
        wait_for(lambda: server.run("maskfed-server", "sites", "list").count(" online ") == 2, 120, "both sites online")
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
        wait_for(lambda: len(rounds(server, "loss")) == 4, 200, "the last round")
        records = rounds(server, "loss")
    everybody = all(len(record["answered"]) == 2 for record in records)
    print(
        f"ServerApp killed: its round done {after_app:.0f} s later; server killed and started again: its round done "
        f"{after_loss:.0f} s later; {len(records)} rounds, {'both sites in each' if everybody else 'one missing'}"
    )
    return int(max(after_app, after_loss) > MOST_SECONDS or not everybody or len(records) != 4)


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
    sys.exit(main())
