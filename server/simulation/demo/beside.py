"""What the private stages were worth: the same figures of several models, on persons that none of them has seen."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from deploy.processes.demo_commands import CommandError, Commands
from server.report.beside import Beside, Model, write_beside
from server.runs.history import Evaluation, read_run
from shared.evaluation.frechet import jackknife_interval

LOSS_IMAGES = 300
"""About one of each held-out person."""


def measure_distances(commands: Commands, models: Sequence[Path], reference: Path, num_images: int) -> None:
    """Measure the distance of each model, the first one alone, and the others side by side by what it has kept."""
    first, others = models[0], models[1:]
    given = ("--reference", str(reference), "--num", str(num_images))
    commands.run("maskfed-server", "evaluate", str(first), *given, log="evaluate.log")
    for path in others:
        # The reference's features, named by its pixels and the network: they take longer than a model's images.
        shutil.copytree(first / "evaluation" / "references", path / "evaluation" / "references", dirs_exist_ok=True)
    with half_the_cores_each():
        commands.together([("maskfed-server", "evaluate", str(path), *given) for path in others])


def compare(
    commands: Commands, models: Mapping[str, Path], reference: Path, run: Path, say: Callable[[str], None]
) -> Beside:
    """Measure the models' losses, keep them and the distances in `run` for its page, say what intervals allow to say.

    Args:
        commands: how the operators' commands are run.
        models: run directories by name, whose distances were measured; one of them is `run`.
        reference: held-out images.
        run: directory of the run that the others are compared with.
        say: prints a line.
    """
    own = next(name for name, path in models.items() if path == run)
    names = [own, *(name for name in models if name != own)]
    given = ("--data", str(reference), "--num", str(LOSS_IMAGES), "--json")
    losses = json.loads(commands.output("maskfed-server", "loss", *(str(models[name]) for name in names), *given))
    distances = [_distance(models[name]) for name in names]
    rows = [_row(*each, distances[0]) for each in zip(names, losses, distances, strict=True)]
    beside = Beside(
        metric=distances[0].distance_name,
        num_loss_images=losses[0]["num_images"],
        num_images=distances[0].result["num_images"],
        models=tuple(rows),
    )
    write_beside(run, beside)
    for line in lines(beside):
        say(line)
    return beside


def lines(beside: Beside) -> Iterator[str]:
    """The table for the terminal, then the verdicts."""
    above = "above private, 95 %"
    yield f"  {'':12} {'loss':>8}  {above:>22}  {beside.metric}, 95 %{above:>24}"
    for each in beside.models:
        loss = "" if each.loss_difference is None else "{:+.5f} to {:+.5f}".format(*each.loss_difference)
        interval = "" if each.distance_interval is None else "  ({:.3f} to {:.3f})".format(*each.distance_interval)
        apart = "" if each.distance_difference is None else "  {:+.3f} to {:+.3f}".format(*each.distance_difference)
        yield f"  {each.name:12} {each.loss:8.5f}  {loss:>22}  {each.distance:.3f}{interval}{apart}"
    own = beside.models[0]
    for other in beside.models[1:]:
        yield (
            f"  {own.name} against {other.name}: loss {beside.loss_verdict(other)}, "
            f"distance {beside.distance_verdict(other)}"
        )


def _distance(path: Path) -> Evaluation:
    """The newest measured distance of a run."""
    found = read_run(path).evaluations
    if not found:
        raise CommandError(f"no distance of {path} was measured")
    return max(found, key=lambda each: each.place)


def _row(name: str, loss: Mapping[str, Any], distance: Evaluation, own: Evaluation) -> Model:
    return Model(
        name=name,
        loss=loss["mean"],
        loss_difference=loss["difference_interval"],
        distance=distance.value,
        distance_interval=None if distance.interval is None else (distance.interval[0], distance.interval[1]),
        distance_difference=None if distance is own else difference(distance, own),
    )


def difference(one: Evaluation, other: Evaluation) -> tuple[float, float] | None:
    """95 percent interval of one distance less another, by the images of each seed left out in both; None without."""
    left_out = [np.array(each.result.get("left_out", []), np.float64) for each in (one, other)]
    is_same = one.group == other.group and one.result.get("seed") == other.result.get("seed")
    if not is_same or len(left_out[0]) != len(left_out[1]):
        return None
    return jackknife_interval(one.value - other.value, list(left_out[0] - left_out[1]))


@contextmanager
def half_the_cores_each() -> Iterator[None]:
    """Commands that begin now use half of the cores, so that two of them go well side by side."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // 2))
    try:
        yield
    finally:
        os.environ.pop("OMP_NUM_THREADS")
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before
