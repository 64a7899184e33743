"""`maskfed-server plan` and `simulate`: what a federated run would cost and do, before any site is asked."""

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from shared.errors import InputError


def register(app: typer.Typer) -> None:
    """Add the commands of this module to the coordinator's."""
    app.command()(plan)
    app.command()(simulate)


def simulate(
    experiment: Annotated[str, typer.Argument(help="Experiment: file or recipe.")],
    *,
    sites: Annotated[int, typer.Option(min=1, help="How many sites to simulate.")] = 10,
    data: Annotated[str, typer.Option(help="Folder or zip of images, or synthetic:IMAGES_PER_SITE.")] = "synthetic:40",
    by: Annotated[
        str, typer.Option(help="How to divide the images: whole persons, or class folders by a Dirichlet distribution.")
    ] = "person",
    alpha: Annotated[
        float,
        typer.Option(
            min=0.001, help="With --by dirichlet: small values give each site few classes, large ones all alike."
        ),
    ] = 0.5,
    init: Annotated[
        str,
        typer.Option(help="Start from this checkpoint, run or shipped model; default: the experiment's train.init."),
    ] = "",
    out: Annotated[
        Path, typer.Option(help="Folder for everything. After an interruption the same command continues there.")
    ] = Path("simulation"),
    cpus: Annotated[int, typer.Option(min=0, help="How many CPUs to use; 0: all.")] = 0,
    cpus_per_site: Annotated[int, typer.Option(min=1, help="CPUs for one site while it trains.")] = 1,
    gpus_per_site: Annotated[
        float, typer.Option(min=0, max=8, help="Share of a GPU for one site, such as 0.25; 0: train on the CPU.")
    ] = 0.0,
    adversary: Annotated[
        str,
        typer.Option(help="Let sites misbehave: KIND[:SITES[:STRENGTH]], such as implant or sign-flip:2."),
    ] = "",
    held_out: Annotated[str, typer.Option(help="Public images; a round that makes them worse is undone.")] = "",
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a setting of the experiment: section.key=value; may be repeated."),
    ] = None,
) -> None:
    """Fine-tune with many simulated sites on this machine. Exit code 0: completed, 1: failed or stopped.

    Needs the extra `simulation`.
    """
    from rich.console import Console

    from server.simulation.simulate import Simulate
    from server.simulation.simulate import simulate as run

    if by not in ("person", "dirichlet"):
        raise InputError(f"--by {by!r}: give person or dirichlet")
    options = Simulate(
        experiment=experiment,
        overrides=tuple(overrides or ()),
        init=init,
        num_sites=sites,
        data=data,
        skew="person" if by == "person" else "dirichlet",
        alpha=alpha,
        out=out,
        num_cpus=cpus,
        cpus_per_site=cpus_per_site,
        gpus_per_site=gpus_per_site,
        adversary=adversary,
        held_out=held_out,
    )
    sys.exit(run(options, Console()))


def plan(
    experiment: Annotated[str, typer.Argument(help="Experiment file, or the name of a recipe.")],
    sites: Annotated[int, typer.Option(min=1, max=100_000, help="Sites that take part in each round.")],
    units_per_site: Annotated[
        int, typer.Option(min=1, max=10**9, help="Training images of each site; persons, where a person is the unit.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a setting of the experiment: section.key=value; may be repeated."),
    ] = None,
    probe_seconds: Annotated[float, typer.Option(min=0.1, max=60, help="How long to measure this machine.")] = 3.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Say what a federated experiment costs and brings: epsilon, signal to noise, bytes, hours, likely refusals."""
    from server.planning.plan_cost import default_refusals, epsilon_after
    from shared.experiment.config import load_experiment
    from shared.experiment.recipes import find_experiment
    from shared.planning.speed_probe import images_per_second, num_values
    from shared.planning.workload import lines, run_bytes, workload
    from shared.secure_aggregation.roster import choice_in_words
    from shared.updates.wire_sizes import wire_bytes

    loaded = load_experiment(find_experiment(experiment), overrides)
    rounds, privacy = loaded.federation.rounds, loaded.privacy
    one, whole = epsilon_after(loaded, 1), epsilon_after(loaded, rounds)
    refusals = default_refusals(loaded)
    sizes = num_values(loaded)
    work = workload(loaded, sites, units_per_site, sizes, images_per_second(loaded, probe_seconds))
    disk = run_bytes(loaded, wire_bytes(sizes[0], "float32"))
    if as_json:
        told: dict[str, object] = {"epsilon_round": _finite(one), "epsilon_run": _finite(whole), "delta": privacy.delta}
        told |= {"unit": privacy.unit if one is not None else None, "default_refusals": refusals, "disk_bytes": disk}
        typer.echo(json.dumps(told | asdict(work)))
        return
    if one is not None and whole is not None:
        image = f"{epsilon_after(loaded, 0):.3g} after its mean image, " if privacy.mean_image_noise else ""
        typer.echo(
            f"epsilon per {privacy.unit} at delta {privacy.delta:g}, at each site: {image}{one:.3g} after one round, "
            f"{whole:.3g} after all {rounds}"
        )
    for line in lines(loaded, work, sites):
        typer.echo(line)
    typer.echo(f"disk of the coordinator: up to {disk / 1e9:.1f} GB of checkpoints")
    if loaded.federation.secure:
        typer.echo(choice_in_words(sites, loaded.federation.secure_colluding))
    for refusal in refusals:
        typer.echo(f"sites with the default policy refuse: {refusal}")


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
