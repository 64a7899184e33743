"""`maskfed-server align` and `loss`: public images made similar to the sites' own, and whether that helped."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shared.commandline import owned

if TYPE_CHECKING:
    from server.evaluation.measures.held_out_loss import HeldOutLoss


def register(app: typer.Typer) -> None:
    """Add the commands of this module to the coordinator's."""
    app.command()(align)
    app.command()(loss)


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
        Path, typer.Option("--home", envvar="MASKFED_SERVER_HOME", callback=owned(), help="The coordinator's folder.")
    ] = Path("coordinator"),
) -> None:
    """Ask each site for one mean image with noise, and make public images similar to them; training on those is free.

    One step of the Gaussian mechanism is charged to each site that answers.
    """
    from server.alignment.aligned_images import align_images
    from server.alignment.mean_images import ask_mean_images, charge_of, load_mean_images
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
    align_images(public, load_mean_images(run), [charge_of(run)], out, typer.echo)
    typer.echo(str(out))


def loss(
    checkpoints: Annotated[list[Path], typer.Argument(help="Checkpoint folders, or run directories: their newest.")],
    data: Annotated[str, typer.Option(help="Images that no model saw: folder, zip, cache, or synthetic:SITE:NUMBER.")],
    num: Annotated[int, typer.Option(min=2, help="At most so many of them.")] = 512,
    seed: Annotated[int, typer.Option(min=0, help="Of the noise, the same for all models.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False,
) -> None:
    """Compare models by the denoising loss of their averaged weights on the same images with the same noise.

    The others are also compared with the first, image by image: an interval that holds 0 says nothing.
    """
    import json

    from server.evaluation.measures.held_out_loss import held_out_loss, interval_of_difference

    found = [held_out_loss(checkpoint, data, num, seed) for checkpoint in checkpoints]
    told = []
    for checkpoint, each in zip(checkpoints, found, strict=True):
        fields = {name: getattr(each, name) for name in ("mean", "error", "parts", "num_images")}
        interval = interval_of_difference(each, found[0]) if each is not found[0] else None
        told.append({"checkpoint": str(checkpoint), **fields, "difference_interval": interval})
        if not as_json:
            typer.echo(_loss_line(checkpoint, each, interval))
    if as_json:
        typer.echo(json.dumps(told))


def _loss_line(checkpoint: Path, found: "HeldOutLoss", interval: tuple[float, float] | None) -> str:
    parts = " ".join(f"{part:.4f}" for part in found.parts)
    line = (
        f"{checkpoint}: {found.mean:.5f} +- {found.error:.5f} on {found.num_images} images; by quarters of the time "
        f"steps, little noise first: {parts}"
    )
    return line if interval is None else f"{line}; less the first {interval[0]:+.5f} to {interval[1]:+.5f} (95 %)"
