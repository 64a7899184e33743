"""What strangers and bad neighbours try, against a running coordinator behind its edge: nothing may be accepted.

Every attempt must be refused and leave exactly one line where its victim looks: the coordinator's `edge.log` (calls),
`edge-error.log` (what never became a call) or `admissions.log`, the site's journal, or the console of the one who was
to run something. The coordinator must stay up, with the same processes. The fuzzed requests go to every path that
the edge lets through.
"""

import base64
import random
import sys
import time
from collections import Counter

from benchmarks.attacks import ATTACKS, Attack
from benchmarks.coordinator import Coordinator
from benchmarks.measure import not_measured, without_options
from benchmarks.scratch import scratch
from deploy.checks.answering import is_healthy
from deploy.coordinator import read_coordinator
from deploy.errors import ProvisionError
from deploy.processes.nginx import find_nginx
from deploy.processes.process import end_together

FUZZED = 1000
SEED = 0
EXPOSED = [
    "/health",
    *(
        f"/v1/fleet/{name}"
        for name in (
            "activate-node",
            "deactivate-node",
            "send-node-heartbeat",
            "pull-messages",
            "push-messages",
            "get-run",
            "get-fab",
            "push-object",
            "pull-object",
            "confirm-message-received",
        )
    ),
]


def main() -> int:
    """Try everything once."""
    try:
        find_nginx()
    except ProvisionError as error:
        return not_measured("hostile", str(error))
    with scratch() as folder:
        coordinator = Coordinator(folder)
        try:
            failed = [name for name, attack in ATTACKS.items() if not attempt(name, attack, coordinator)]
            answers, lines = fuzz(coordinator)
            is_up = coordinator.family() == coordinator.pids
            is_up = is_up and is_healthy(f"127.0.0.1:{read_coordinator(coordinator.home).port}", coordinator.ca)
        finally:
            end_together([coordinator.process], 40)
    accepted = sum(number for status, number in answers.items() if 200 <= status < 300)
    print(f"answers to {FUZZED} fuzzed requests: {dict(sorted(answers.items()))}; lines in the edge's log: {lines}")
    print(
        f"{len(ATTACKS) - len(failed)} of {len(ATTACKS)} attacks refused with one line each, {accepted} of {FUZZED} "
        f"fuzzed requests accepted, {lines} lines, server {'up' if is_up else 'NOT up'}"
        + (f"; not so: {', '.join(failed)}" if failed else "")
    )
    return int(bool(failed) or accepted > 0 or not is_up or lines != FUZZED)


def attempt(name: str, attack: Attack, coordinator: Coordinator) -> bool:
    """Whether every attempt of an attack is refused, and each leaves one line."""
    before = attack.lines(coordinator)
    number = attack.run(coordinator)
    time.sleep(0.5)
    left = attack.lines(coordinator) - before
    is_good = number > 0 and left == number
    print(f"{name}: {f'{number} refused' if number else 'NOT REFUSED'}, {left} lines", flush=True)
    return is_good


def fuzz(coordinator: Coordinator) -> tuple[Counter[int], int]:
    """Random bytes under random headers to every exposed path; statuses, and lines in the edge's log."""
    random_ = random.Random(SEED)
    before = len(coordinator.refusals())
    answers: Counter[int] = Counter()
    for number in range(FUZZED):
        path = EXPOSED[number % len(EXPOSED)]
        method = random_.choice(["POST", "POST", "PUT", "GET", "DELETE"]) if path != "/health" else "POST"
        body = random_.randbytes(random_.randrange(0, 3000))
        headers = {
            "Host": "localhost",
            "Connection": "close",
            "Content-Length": str(len(body)),
            "Content-Type": random_.choice(["application/protobuf", "application/json", "application/x-protobuf", "*"]),
            "flwr-public-key": base64.b64encode(random_.randbytes(random_.randrange(200))).decode(),
            "flwr-timestamp": random_.choice(["0", "now", str(time.time()), "9" * 400, "-1"]),
            "flwr-signature": random_.randbytes(random_.randrange(100)).hex(),
        }
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        answers[coordinator.send("\r\n".join(lines).encode() + body)] += 1
    time.sleep(0.5)
    return answers, len(coordinator.refusals()) - before


if __name__ == "__main__":
    sys.exit(without_options(main, __doc__))
