"""Kills at random points of reserve, train, commit and reply, and the speed of `reserve` on a long ledger.

`--kills N` forks N processes from a warmed one; each answers training requests on the same real files until SIGKILL.
Training itself is replaced by a note in a pipe and a pause, and the accountant by a sum, so that the kills fall on the
ledger. After each kill: charges on disk are never fewer than the trainings begun, the chain verifies, and no request
was ever answered with two different updates for one charge.
"""

import argparse
import hashlib
import itertools
import json
import os
import random
import signal
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import numpy as np

from benchmarks.measure import verdict
from benchmarks.scratch import scratch
from client import training_request
from client.data.dataset import scan
from client.home import Home
from client.limits import Ranges
from client.records.chain import open_chain, read_chain
from client.records.data_registry import REGISTRY_VARIABLE
from client.records.ledger import open_ledger, read_ledger
from client.records.spending import Charge, Spending
from client.settings import SiteConfig, SitePolicy, save_settings
from client.training import local_round
from shared.data.synthetic import write_folder
from shared.experiment.config import Experiment
from shared.messages.packing import Manifest, TensorSpec
from shared.messages.training import RequestHeader, TrainRequest

SEED = 0
ROUNDS = 1
NEEDED_SECONDS, ENTRIES, PLANS = 1.0, 10_000, 10
LIFE_ROUNDS, WARM_UP_ROUNDS, REMEASURE_KILLS = 3.0, 4, 50


def main(arguments: Sequence[str] = ()) -> int:
    """Print counts and seconds; 0 when nothing was under-counted and `reserve` is fast enough."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=SEED)
    options = parser.parse_args(arguments)
    with scratch() as folder:
        outcome = run_kills(folder, options.kills, options.seed)
        print(", ".join(f"{name} {value}" for name, value in outcome.items()))
        seconds = reserve_seconds(folder)
    text = (
        f"{options.kills} kills: {outcome['under-counted']} under-counted, {outcome['damaged']} damaged; reserve on "
        f"{ENTRIES} entries with {PLANS} plans {seconds:.2f} s (limit {NEEDED_SECONDS:g} s)"
    )
    is_reached = not outcome["under-counted"] and not outcome["damaged"] and seconds <= NEEDED_SECONDS
    return verdict("ledger", text, reached=is_reached)


def run_kills(folder: Path, kills: int, seed: int) -> dict[str, int]:
    """Kill `kills` times; counts of trainings, charges, replies, torn lines and of everything that must not happen."""
    home = make_site(folder)
    draw = random.Random(seed)
    counts = dict.fromkeys(("trainings", "charges", "replies", "torn lines", "under-counted", "damaged"), 0)
    answers: dict[str, set[str]] = defaultdict(set)
    longest_seconds = LIFE_ROUNDS * warm_up(home, 10**8)
    first = len(read_ledger(home.ledger).charges)
    for number in range(kills):
        if number and number % REMEASURE_KILLS == 0:
            # The ledger has grown, and the machine may be busier: rounds take longer than they did.
            longest_seconds = LIFE_ROUNDS * warm_up(home, 10**8 + 10 * number)
            first += WARM_UP_ROUNDS
        for event in life(home, draw.uniform(0.0, longest_seconds), number):
            if event[0] == "training":
                counts["trainings"] += 1
            else:
                counts["replies"] += 1
                answers[event[1]].add(event[2])
        try:
            history = read_ledger(home.ledger)
            read_chain(home.journal)
        except ValueError:
            counts["damaged"] += 1
            continue
        counts["charges"] = len(history.charges) - first
        charged: dict[str, int] = defaultdict(int)
        for _, charge in history.charges:
            charged[charge.request_digest] += 1
        too_many_answers = any(len(found) > charged[digest] for digest, found in answers.items())
        counts["under-counted"] += counts["charges"] < counts["trainings"] or too_many_answers
    counts["torn lines"] = sum(entry.kind == "recovered" for entry in read_ledger(home.ledger).entries)
    return counts


def life(home: Home, seconds: float, number: int) -> list[list[str]]:
    """Fork a process that answers requests, kill it after `seconds`; what it noted in its pipe."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            answer_for_ever(home, writer, number)
        finally:
            os._exit(1)
    os.close(writer)
    while os.read(reader, 1) not in (b"", b"\n"):
        pass
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with os.fdopen(reader, "rb") as file:
        *lines, _torn = file.read().split(b"\n")
    return [json.loads(line) for line in lines]


def answer_for_ever(home: Home, writer: int, number: int) -> None:
    """Ask this site for round after round of one run, until killed."""
    os.write(writer, b"ready\n")
    # Every second process asks again what the one before was asked, as a coordinator does after a crash.
    for server_round in itertools.count(1 + number // 2 * 1000):
        answer(home, writer, server_round)


def answer(home: Home, writer: int, server_round: int) -> None:
    """One round; note the training as it begins and the reply when it is out."""

    def note(*event: str) -> None:
        os.write(writer, json.dumps(event).encode() + b"\n")

    class Training:
        """Stands in for `client.training.local_round.Round`."""

        def __init__(self, *_: object) -> None:
            pass

        def run(self) -> tuple[np.ndarray, dict[str, float]]:
            note("training")
            time.sleep(random.uniform(0, 0.003))
            return np.frombuffer(os.urandom(64), np.uint8).astype(np.float32), {"loss": 0.0}

    with (
        mock.patch.object(local_round, "Round", Training),
        mock.patch.object(training_request, "epsilon_of", lambda history, _: sum(row.steps for row in history) * 1e-6),
    ):
        request = make_request(server_round)
        reply = training_request.handle(request.to_record(), home)
        assert reply.update is not None, reply.header
        note("reply", request.digest, hashlib.sha256(reply.update.tobytes()).hexdigest())


def warm_up(home: Home, server_round: int) -> float:
    """Seconds of a round, with everything loaded; WARM_UP_ROUNDS rounds from `server_round` on are charged."""
    writer = os.open(os.devnull, os.O_WRONLY)
    seconds = []
    for number in range(WARM_UP_ROUNDS):
        start = time.perf_counter()
        answer(home, writer, server_round + number)
        seconds.append(time.perf_counter() - start)
    os.close(writer)
    return statistics.median(seconds[1:])


def make_request(server_round: int) -> TrainRequest:
    """A tiny request of an endless DP run."""
    sections = {
        "privacy": {"mechanism": "dp-sgd"},
        "federation": {"rounds": 10**9, "local_steps": 1, "min_replies": 1},
        "model": {"image_size": 16},
    }
    manifest = Manifest(tensors=(TensorSpec(name="w", shape=(64,)),))
    header = RequestHeader(
        run="run",
        server_round=server_round,
        experiment=Experiment.model_validate(sections),
        precision="float32",
        manifest=manifest,
    )
    return TrainRequest(header, np.zeros(64, np.float32))


def make_site(folder: Path) -> Home:
    """A scanned site that allows every request of this benchmark."""
    os.environ[REGISTRY_VARIABLE] = str(folder / "registry")
    home = Home(folder / "home")
    write_folder(folder / "photos", num_images=8, size=16, seed=SEED)
    policy = SitePolicy(
        tasks=("train",), experiments="any", epsilon_cap=1e6, min_noise_multiplier=0.1, max_steps_per_round=100,
        max_rounds_per_day=10**9, ranges=Ranges(rounds=(1, 10**9)),
    )  # fmt: skip
    settings = SiteConfig(
        alias="site0",
        address="127.0.0.1:1",
        data=str(folder / "photos"),
        image_size=16,
        head_file=str(folder / "head" / "ledger.json"),
        policy=policy,
    )
    save_settings(home, settings)
    scan(home, settings)
    return home


def reserve_seconds(folder: Path) -> float:
    """Wall seconds to open a ledger of 10,000 entries with 10 plans, check it, and reserve; Opacus is loaded before."""
    from client.privacy.accounting import epsilon

    path, head = folder / "long" / "ledger.jsonl", folder / "long-head" / "head.json"
    with mock.patch("os.fsync"), open_chain(path, wait=False) as chain:
        chain.append("open", ledger_id="long")
        while len(chain.entries) < ENTRIES:
            number = len(chain.entries) // 2
            entry = chain.append("reserve", **long_charge(number).model_dump(mode="json"))
            chain.append("commit", reserve=entry.sequence)
    epsilon([Spending(1.0, 0.01, 1)], 1e-5)
    start = time.perf_counter()
    with open_ledger(path, head, adopt=True) as ledger:
        _, total = ledger.reserve(long_charge(0), cap=1e9, delta=1e-5, epsilon_of=epsilon)
    seconds = time.perf_counter() - start
    print(f"{ENTRIES} entries: epsilon {total.epsilon:.2f} after {total.num_charges} charges, {seconds:.2f} s")
    return seconds


def long_charge(number: int) -> Charge:
    """Round `number` of ten plans in turn."""
    return Charge(
        dataset_id="data",
        fingerprint="none",
        task="train",
        run=f"run{number % PLANS}",
        server_round=number // PLANS + 1,
        request_digest=str(number),
        plan_digest=str(number % PLANS),
        mechanism="dp-sgd",
        noise_multiplier=1.0 + 0.1 * (number % PLANS),
        sample_rate=0.005,
        steps=2,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
