"""`maskfed-server align`: public images made similar to the sites' own."""

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command of this module to the coordinator's."""
    app.command()(align)


def align(
    experiment: Annotated[
        str, typer.Argument(help="Experiment file or recipe that sites have approved; privacy.mean_image_noise is set.")
    ],
    data: Annotated[str, typer.Option(help="PUBLIC images: folder, zip, cache, or synthetic:SITE:NUMBER.")],
    out: Annotated[Path, typer.Option(help="New folder of the aligned images, for `train --data`.")],
    mean_images: Annotated[
        Path | None,
        typer.Option(help="Run of an earlier `align`, whose mean images are used again: nothing is asked or charged."),
    ] = None,
    deadline: Annotated[float, typer.Option(min=1, help="Seconds that sites have.")] = 3600.0,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a setting of the experiment: section.key=value; may be repeated."),
    ] = None,
    home: Annotated[
        Path, typer.Option("--home", envvar="MASKFED_SERVER_HOME", help="The coordinator's folder.")
    ] = Path("coordinator"),
) -> None:
    """Ask each site for one mean image with noise, and make public images similar to them; training on those is free.

    One step of the Gaussian mechanism is charged to each site that answers.
    """
    from server.alignment.aligned_images import align_images
    from server.alignment.mean_images import ask_mean_images, load_mean_images
    from server.training.progress_bars import decoding_bar
    from shared.data.image_cache import open_images
    from shared.errors import InputError
    from shared.experiment.config import load_experiment
    from shared.experiment.recipes import find_experiment

    loaded = load_experiment(find_experiment(experiment), overrides)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out} is there already: name a new folder")
    # Whatever can be wrong with the images is found before any budget is spent.
    with decoding_bar() as on_progress:
        public = open_images(data, loaded.model.image_size, on_progress=on_progress)
    run = mean_images or ask_mean_images(home, loaded, typer.echo, deadline_seconds=deadline)
    if mean_images is None:
        typer.echo(f"kept for later alignments: --mean-images {run}")
    align_images(public, load_mean_images(run), out, typer.echo)
    typer.echo(str(out))
