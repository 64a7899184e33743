"""What the private stages were worth: the same figures of several models, on persons that none of them has seen."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from deploy.processes.demo_commands import CommandError, Commands
from server.report.beside import Beside, Model, write_beside
from server.runs.history import Evaluation, read_run

LOSS_IMAGES = 300
"""About one of each held-out person."""


def measure_distances(commands: Commands, models: Iterable[Path], reference: Path) -> None:
    """Measure the distance of each model that has none, side by side."""
    missing = [path for path in models if not read_run(path).evaluations]
    given = ("--reference", str(reference))
    commands.together([("maskfed-server", "evaluate", str(path), *given) for path in missing])


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
    rows = [_row(*each) for each in zip(names, losses, distances, strict=True)]
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
    yield f"  {'':12} {'loss':>8}  {'above private, 95 %':>22}  {beside.metric}, 95 %"
    for each in beside.models:
        difference = "" if each.loss_difference is None else "{:+.5f} to {:+.5f}".format(*each.loss_difference)
        interval = "" if each.distance_interval is None else "  ({:.3f} to {:.3f})".format(*each.distance_interval)
        yield f"  {each.name:12} {each.loss:8.5f}  {difference:>22}  {each.distance:.3f}{interval}"
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


def _row(name: str, loss: Mapping[str, Any], distance: Evaluation) -> Model:
    return Model(
        name=name,
        loss=loss["mean"],
        loss_difference=loss["difference_interval"],
        distance=distance.value,
        distance_interval=None if distance.interval is None else (distance.interval[0], distance.interval[1]),
    )
