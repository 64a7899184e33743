"""The paper's Figure 2 in minutes: learn the marginals of a toy distribution first, then the joint distribution.

A point of a Swiss roll (2 coordinates) or a rose (3) is a sequence of coordinates, each a token with its position.
Masked score matching shows the network one coordinate of the roll, or two of the rose, and so teaches it all marginals
of that size; sampled without a mask, it draws from a marginal proxy. Denoising score matching then starts from there,
and is compared with denoising score matching from scratch at equal operations, the masked stage counted in.

Shapes: N coordinates.
"""

import json
import shlex
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from server.studies.stored_toys import ToyName, ToyPoint, ToyResult, ToyRun
from server.studies.toy_network import draw_samples, new_model, train
from server.studies.toy_shapes import draw, energy_distance, without_dependence
from shared.diffusion.schedule import make_schedule
from shared.seeding import derive_seed, generator
from shared.storage.files import write_atomically
from shared.storage.versions import git_commit
from shared.training.flops import hardware

VISIBLE: dict[ToyName, int] = {"swiss-roll": 1, "rose": 2}
"""Coordinates that masked score matching shows: single ones of the roll, all pairs of the rose."""
BUDGETS = (500, 2000, 8000)
"""Operations of a whole training, in steps of denoising score matching."""
MASKED_SHARE = 0.5
"""Of the operations that go into masked score matching, where there is any."""
LEAST_SHOWN = 1e-4
"""About what two draws of the data differ by: a logarithmic axis ends there."""
SHOWN_BUDGET = 2000
"""The figure's clouds are drawn at this budget, or at the first one."""


def run_toy(
    name: ToyName,
    out: Path,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    budgets: Sequence[int] = BUDGETS,
    num_samples: int = 4000,
) -> ToyResult:
    """Train both ways at each budget and seed; the figure and the distances.

    Args:
        name: which distribution.
        out: folder that gets `<name>.png` and `<name>.json`; made if missing.
        seeds: each of everything.
        budgets: operations of a whole training, in steps of denoising score matching.
        num_samples: points drawn for the distances and the figure.

    Returns:
        Distances and settings, as written to `<name>.json`.
    """
    started, runs = time.perf_counter(), []
    shown: dict[str, Tensor] = {}
    for seed in seeds:
        run, clouds = _run(name, seed, budgets, num_samples)
        runs.append(run)
        shown = shown or clouds
    result = ToyResult(
        name=name,
        num_samples=num_samples,
        runs=tuple(runs),
        seconds=round(time.perf_counter() - started, 1),
        threads=torch.get_num_threads(),
        hardware=hardware(),
        commit=git_commit(),
        command=_command(name, seeds, budgets),
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
    )
    out.mkdir(parents=True, exist_ok=True)
    _plot(shown, result, out / f"{name}.png")
    write_atomically(out / f"{name}.json", json.dumps(result.model_dump(), indent=1) + "\n")
    return result


def _command(name: ToyName, seeds: Sequence[int], budgets: Sequence[int]) -> str:
    """What to type for the same numbers."""
    shorter = [] if tuple(budgets) == BUDGETS else [f"--operations={budget}" for budget in budgets]
    return shlex.join(["maskfed-server", "toy", name, *(f"--seed={seed}" for seed in seeds), *shorter])


def _run(name: ToyName, seed: int, budgets: Sequence[int], count: int) -> tuple[ToyRun, dict[str, Tensor]]:
    data, fresh = (draw(name, count, generator(derive_seed(seed, name, part))) for part in ("data", "held out"))
    clouds, points = {"data": data}, []
    for budget in budgets:
        proxy, finetuned, scratch, steps = _trainings(name, seed, budget, count)
        distances = [energy_distance(cloud, fresh) for cloud in (proxy, finetuned, scratch)]
        points.append(
            ToyPoint(
                operations=budget,
                masked_steps=steps[0],
                denoising_steps=steps[1],
                proxy=distances[0],
                two_stages=distances[1],
                scratch=distances[2],
            )
        )
        if len(clouds) == 1 and (budget == SHOWN_BUDGET or SHOWN_BUDGET not in budgets):
            clouds |= {"marginal proxy": proxy, "both stages": finetuned, "from scratch": scratch}
    shuffled = without_dependence(data, generator(derive_seed(seed, name, "shuffled")))
    floor, independent = energy_distance(data, fresh), energy_distance(shuffled, fresh)
    return ToyRun(seed=seed, points=tuple(points), floor=floor, independent=independent), clouds


def _trainings(name: ToyName, seed: int, budget: int, count: int) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
    """Samples of the proxy, of both stages and from scratch, and the steps of the two stages."""
    schedule = make_schedule("linear", 1000)
    num_coordinates = draw(name, 1, generator(0)).shape[1]
    # A coordinate costs the same wherever it is shown, and a hidden one costs nothing.
    masked = round(MASKED_SHARE * budget * num_coordinates / VISIBLE[name])
    denoising = budget - round(masked * VISIBLE[name] / num_coordinates)
    model, scratch = new_model(num_coordinates, seed), new_model(num_coordinates, seed)
    train(model, schedule, name, VISIBLE[name], masked, derive_seed(seed, "msm"))
    proxy = draw_samples(model, schedule, count, seed)
    train(model, schedule, name, num_coordinates, denoising, derive_seed(seed, "dsm"))
    train(scratch, schedule, name, num_coordinates, budget, derive_seed(seed, "dsm"))
    both, alone = (draw_samples(each, schedule, count, seed) for each in (model, scratch))
    return proxy, both, alone, (masked, denoising)


def _plot(clouds: dict[str, Tensor], result: ToyResult, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(18, 3.8), layout="constrained")
    for place, (title, points) in enumerate(clouds.items(), 1):
        is_solid = points.shape[1] == 3
        axes: Any = figure.add_subplot(1, 5, place, projection="3d" if is_solid else None)
        axes.scatter(
            *points.T.numpy(), s=1, c=points[:, -1].numpy(), cmap="magma" if is_solid else "viridis", vmin=-1, vmax=1
        )
        for set_limits in (axes.set_xlim, axes.set_ylim, *([axes.set_zlim] if is_solid else [])):
            set_limits(-1.2, 1.2)
        axes.set_title(title)
    _curves(figure.add_subplot(1, 5, 5), result)
    figure.savefig(path, dpi=110)


def _curves(axes: Any, result: ToyResult) -> None:  # noqa: ANN401  # matplotlib has no types
    first = result.runs[0]
    budgets = [point.operations for point in first.points]
    for what, label, colour in (
        ("proxy", "masked stage alone", "tab:gray"),
        ("two_stages", "both stages", "tab:blue"),
        ("scratch", "from scratch", "tab:orange"),
    ):
        medians = [max(LEAST_SHOWN, result.median(what, k)) for k in range(len(budgets))]
        axes.plot(budgets, medians, marker="o", label=label, color=colour)
        for run in result.runs:
            axes.plot(budgets, [max(LEAST_SHOWN, getattr(p, what)) for p in run.points], linewidth=0.5, color=colour)
    axes.axhline(first.independent, linestyle=":", color="black", label="independent coordinates")
    axes.set(xscale="log", yscale="log", xlabel="operations, in denoising steps", title="energy distance")
    axes.set_xticks(budgets, [f"{budget:,}" for budget in budgets])
    axes.set_xticks([], minor=True)
    axes.legend(fontsize=7)
