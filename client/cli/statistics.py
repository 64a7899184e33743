"""`maskfed-client statistics`: write this site's feature statistics for the coordinator."""

from pathlib import Path
from typing import Annotated

import typer

from client.settings import find_home, load_settings
from shared.commandline import owned
from shared.errors import InputError

HomeOption = Annotated[
    Path | None,
    typer.Option(
        "--home", envvar="MASKFED_CLIENT_HOME", callback=owned("site"), help="The site's folder; default: ./site."
    ),
]


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command()(statistics)


def statistics(
    out: Annotated[Path, typer.Option(help="Statistics file for the coordinator (.safetensors).")],
    extractor: Annotated[str, typer.Option(help="Feature network: inception-v3-compat, random-inception, onnx:FILE.")],
    weights: Annotated[Path | None, typer.Option(help="File of the extractor's weights.")] = None,
    projection: Annotated[Path | None, typer.Option(help="The coordinator's projection: release with DP.")] = None,
    noise: Annotated[float, typer.Option(help="Noise multiplier of a DP release.")] = 1.1,
    home: HomeOption = None,
) -> None:
    """Write feature statistics for the coordinator; charged. Exact, so of unbounded epsilon, without --projection."""
    from client.answers.statistics.release import StatisticsPlan, release_statistics
    from client.privacy.epsilon import epsilon_of
    from shared.evaluation.feature_statistics import save_statistics
    from shared.evaluation.networks import load_extractor
    from shared.evaluation.private_statistics import load_projection

    place = find_home(home)
    settings = load_settings(place)
    if out.suffix != ".safetensors":
        raise InputError(f"--out {out}: give a name that ends in .safetensors")
    network = load_extractor(extractor, weights=weights)
    public = load_projection(projection) if projection else None
    plan = StatisticsPlan("dp" if public else "exact", network.space, public, noise)
    found = release_statistics(place, settings, plan, lambda: network, epsilon_of)
    save_statistics(found, out)
    spent = "exact: this site's total is unbounded" if found.release == "exact" else f"noise multiplier {noise:g}"
    typer.echo(f"{out}: {found.release} statistics, {spent}")
