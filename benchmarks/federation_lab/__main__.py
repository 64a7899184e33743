"""What dividing the training among sites costs, and why: small networks on real faces, three paired seeds.

    python -m benchmarks.federation_lab --faces FACES [--work FOLDER] [--arms NAMES] [--seeds N]

Every arm ends as a line of `results.jsonl`; those that are there are not run again. Arms share start, images, time
steps and noise. Without `--faces` nothing runs and the table of what is there is printed.
"""

import argparse
import datetime
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.federation_lab.arms import ARMS, STEPS, Arm
from benchmarks.federation_lab.averages import NAMES, Averages, held_out
from benchmarks.federation_lab.table import table
from benchmarks.federation_lab.training import StackedTraining
from benchmarks.federation_lab.world import World, install, open_faces
from benchmarks.measure import hardware, verdict
from shared.storage.versions import git_commit

SEED = 0
RESULTS = Path(__file__).parent / "results.jsonl"
TIMED_STEPS = 4


def main(arguments: list[str] | None = None) -> int:
    """Run the arms that are missing and print the table; 0 when the goals are reached."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.federation_lab", description=__doc__.splitlines()[0])
    parser.add_argument("--faces", default="", help="real faces, in folders by person")
    parser.add_argument("--work", type=Path, default=Path("runs/federation_lab"), help="of the starts, not for git")
    parser.add_argument("--arms", default="", help="run these, by name, separated by commas; default: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    if options.faces:
        torch.set_num_threads(1)
        install()
        images = open_faces(options.faces)
        worlds = [World(seed, images, options.work) for seed in range(options.seeds)]
        run_missing(chosen(options.arms), worlds, options.results)
    text, is_reached = table(read(options.results))
    return verdict("a federation of small networks", text, reached=is_reached)


def chosen(names: str) -> list[Arm]:
    """The arms of these names, in this order."""
    known = {arm.name: arm for arm in ARMS}
    return [known[name] for name in names.split(",")] if names else list(ARMS)


def read(results: Path) -> list[dict[str, Any]]:
    """What is there of arms that are still defined as they were; what a line does not name was the default."""
    if not results.exists():
        return []
    known, default = {arm.name: _told(arm) for arm in ARMS}, _told(Arm("any"))
    lines = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if known.get(line["arm"]["name"]) == default | line["arm"]]


def run_missing(arms: Sequence[Arm], worlds: Sequence[World], results: Path) -> None:
    """Run what has no line yet, in order, after saying how long it takes."""
    done = {line["arm"]["name"] for line in read(results) if line["seeds"] == [world.seed for world in worlds]}
    missing = [arm for arm in arms if arm.name not in done]
    if not missing:
        return
    seconds = seconds_per_image(worlds)
    images = sum(arm.images for arm in missing) * len(worlds)
    print(f"{len(missing)} arms, {images} images: about {images * seconds / 60:.0f} minutes of this core", flush=True)
    for arm in missing:
        facts = run(arm, worlds)
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(facts) + "\n")


def seconds_per_image(worlds: Sequence[World]) -> float:
    """Of a step of four sites, by the processor."""
    training = StackedTraining(Arm("timed", steps=STEPS), worlds)
    training.step(0, 0, STEPS)
    begin = time.process_time()
    for step in range(TIMED_STEPS):
        training.step(step, 0, STEPS)
    return (time.process_time() - begin) / TIMED_STEPS / (16 * len(worlds))


def run(arm: Arm, worlds: Sequence[World]) -> dict[str, Any]:
    """One arm with its measurements, as a line of the results."""
    begin, training = time.process_time(), StackedTraining(arm, worlds)
    points = training.run()
    averages = Averages(next(points), training.setting.optim.ema_decay)
    scores = {}
    for point in points:
        averages.add(point)
        if point.step in (arm.steps // 2, arm.steps):
            names = NAMES if point.step == arm.steps else ("raw", "ema")
            scores[str(point.step)] = {name: held_out(training, worlds, averages.means[name]) for name in names}
            raw = [round(loss, 5) for loss, _ in scores[str(point.step)]["raw"]]
            print(f"{arm.name}: step {point.step}, raw {raw}, {time.process_time() - begin:.0f} s", flush=True)
    return {
        "arm": _told(arm),
        "seeds": [world.seed for world in worlds],
        "scores": scores,
        "seconds": round(time.process_time() - begin, 1),
        "commit": git_commit(),
        "hardware": hardware(),
        "date": datetime.date.today().isoformat(),
    }


def _told(arm: Arm) -> dict[str, Any]:
    """An arm as a line of the results has it."""
    told: dict[str, Any] = json.loads(json.dumps(asdict(arm)))
    return told


if __name__ == "__main__":
    sys.exit(main())
