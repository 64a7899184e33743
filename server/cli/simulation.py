"""`maskfed-server simulate`: many sites on this machine, some of them perhaps adversaries."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from shared.errors import InputError


def register(app: typer.Typer) -> None:
    """Add the command of this module to the coordinator's."""
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
