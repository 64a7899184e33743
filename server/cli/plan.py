"""`maskfed-server plan`: what a federated experiment would cost and bring, before anybody is asked."""

import json
import math
from dataclasses import asdict
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command to the coordinator's."""
    app.command()(plan)


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
    from server.planning.plan import default_refusals, epsilon_after
    from shared.experiment.config import load_experiment
    from shared.experiment.recipes import find_experiment
    from shared.planning.probe import images_per_second, num_values
    from shared.planning.workload import lines, workload

    loaded = load_experiment(find_experiment(experiment), overrides)
    rounds, privacy = loaded.federation.rounds, loaded.privacy
    one, whole = epsilon_after(loaded, 1), epsilon_after(loaded, rounds)
    refusals = default_refusals(loaded)
    work = workload(loaded, sites, units_per_site, num_values(loaded), images_per_second(loaded, probe_seconds))
    if as_json:
        told: dict[str, object] = {"epsilon_round": _finite(one), "epsilon_run": _finite(whole), "delta": privacy.delta}
        told |= {"unit": privacy.unit if one is not None else None, "default_refusals": refusals}
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
    for refusal in refusals:
        typer.echo(f"sites with the default policy refuse: {refusal}")


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
