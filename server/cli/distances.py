"""`maskfed-server`: the commands that measure distances. They import heavy packages when they run."""

from pathlib import Path
from typing import Annotated, Any

import typer

from server.cli.evaluation import Batch, Device, Overrides, Precision, Raw, drawing_of, progress
from shared.commandline import owned


def register(app: typer.Typer) -> None:
    """Add the commands of this module to the coordinator's."""
    app.command()(evaluate)
    app.command()(projection)


def evaluate(
    *,
    checkpoint: Annotated[
        Path | None,
        typer.Argument(help="Checkpoint folder, or a run directory for its newest checkpoint; none with --samples."),
    ] = None,
    reference: Annotated[
        str,
        typer.Option(
            help="What to compare with: images (folder, zip, cache, FILE.npy, synthetic:SITE:N), "
            "statistics files A,B, FILE.npz:N (mu and sigma of N images), "
            "sigma, or `federated` to compare with."
        ),
    ],
    extractor: Annotated[
        str,
        typer.Option(
            help="Network: inception-v3-compat, random-inception, onnx:FILE, clip-*, dinov2-*; "
            "default: as the experiment says."
        ),
    ] = "",
    weights: Annotated[
        Path | None, typer.Option(help="Weights file of the feature network; default: download it.")
    ] = None,
    weights_sha256: Annotated[
        str, typer.Option(help="SHA-256 that your weights file must have, if it is not the published file.")
    ] = "",
    samples: Annotated[
        str, typer.Option(help="Measure these images of any model instead: folder, zip, cache, FILE.npy, FILE.npz.")
    ] = "",
    size: Annotated[
        int, typer.Option(min=0, max=4096, help="With --samples: side in pixels to compare at; 0: the samples' own.")
    ] = 0,
    num: Annotated[
        int,
        typer.Option(
            "--num",
            "--num-images",
            min=0,
            help="How many images to generate (--num-images under torchrun); 0: as the experiment says.",
        ),
    ] = 0,
    home: Annotated[
        Path,
        typer.Option(
            "--home",
            envvar="MASKFED_SERVER_HOME",
            callback=owned(),
            help="The coordinator's folder; needed for the reference `federated`.",
        ),
    ] = Path("coordinator"),
    private: Annotated[
        bool, typer.Option("--private", help="With `federated`: ask sites for statistics with differential privacy.")
    ] = False,
    noise: Annotated[float, typer.Option(help="Noise multiplier for --private.")] = 1.1,
    projection: Annotated[
        Path | None, typer.Option(help="Projection file for --private, made by `projection`.")
    ] = None,
    bootstrap: Annotated[
        int,
        typer.Option(
            min=0, max=100_000, help="Interval of the distance from this many bootstrap resamples; 0: jackknife."
        ),
    ] = 0,
    name: Annotated[
        str, typer.Option(help="Name of the evaluation's folder; default: made from checkpoint and distance.")
    ] = "",
    out: Annotated[Path | None, typer.Option(help="Folder to write to; default: evaluation/ in the run.")] = None,
    every_checkpoint: Annotated[bool, typer.Option("--all", help="Evaluate every checkpoint of the run.")] = False,
    batch: Batch = 0,
    raw: Raw = False,
    precision: Precision = "float32",
    device: Device = "",
    overrides: Overrides = None,
) -> None:
    """Measure how far generated images are from real ones: Frechet distance, KID, precision, recall."""
    from server.evaluation.evaluate import evaluate as run
    from server.evaluation.evaluate import evaluate_run, evaluate_samples
    from server.evaluation.yardstick import Options

    given = {"--num": num, "--all": every_checkpoint, "--raw": raw, "--set": overrides, "--private": private}
    _check_source(checkpoint, samples, size, [name for name, value in given.items() if value])
    with progress("images") as on_progress:
        options = Options(
            reference=reference,
            extractor=extractor,
            weights_file=weights,
            weights_sha256=weights_sha256,
            num_images=num,
            drawing=drawing_of(batch, raw, precision, device, overrides, on_progress),
            bootstrap=bootstrap,
            projection=projection,
            home=home,
            release="dp" if private else "exact",
            noise_multiplier=noise,
            say=typer.echo,
            name=name,
            out=out,
        )
        if checkpoint is None:
            files = [evaluate_samples(samples, options, size)]
        else:
            files = evaluate_run(checkpoint, options) if every_checkpoint else [run(checkpoint, options)]
    for file in files:
        _show(file)


def projection(
    data: Annotated[str, typer.Option(help="PUBLIC images: folder, zip, cache, synthetic:SITE:N.")],
    out: Annotated[Path, typer.Option(help="File to write; send it to the sites.")],
    size: Annotated[int, typer.Option(min=8, max=4096, help="Image size in pixels; the same as at the sites.")],
    extractor: Annotated[str, typer.Option(help="Feature network.")] = "inception-v3-compat",
    weights: Annotated[
        Path | None, typer.Option(help="Weights file of the feature network; default: download it.")
    ] = None,
    dimensions: Annotated[int, typer.Option(min=1, help="How many principal directions to keep.")] = 64,
    device: Device = "",
) -> None:
    """Make the projection that sites need for statistics with differential privacy, from public images."""
    from server.evaluation.drawing import pick_device
    from server.evaluation.reference import features_of_images
    from shared.data.image_cache import open_images
    from shared.errors import InputError
    from shared.evaluation.networks import load_extractor
    from shared.evaluation.private_statistics import make_projection, save_projection
    from shared.storage.chunks import rank_from_environment

    if out.exists():
        raise InputError(f"--out {out} exists already: name a new file")
    network = load_extractor(extractor, weights=weights, device=pick_device(device, rank_from_environment()))
    made = make_projection(features_of_images(open_images(data, size), network), network.space, dimensions)
    save_projection(made, out)
    typer.echo(f"{out}: {dimensions} directions of {network.space.extractor}, radius {made.radius:.6g}")


def _show(file: Path) -> None:
    import json

    if not file.exists():  # Another rank writes it.
        return
    result = json.loads(file.read_text(encoding="utf-8"))
    shown = [
        f"{name} {value:.6g}" + (" ({:.4g} to {:.4g})".format(*bounds) if bounds else "")
        for name, value in result["metrics"].items()
        for bounds in [result["intervals"].get(name)]
    ]
    kind = result["reference"]["release"]
    note = "" if kind == "own" else f", {kind} statistics"
    typer.echo(f"{file}: {', '.join(shown)}")
    if noise := result["noise"]:
        shown_noise = f"noise adds about {noise['bias']:.4g}, distances below {noise['resolution']:.4g} are noise"
        typer.echo(f"  private statistics: {shown_noise}{'' if noise['is_resolved'] else '; THIS ONE IS'}")
    typer.echo(
        f"  {result['num_images']:,} images of {_whose(result)} against {result['reference']['n']:,.0f} of "
        f"{_with_left_out(result['reference'])}{note}, {result['wall_seconds']:.0f} s"
    )


def _whose(result: dict[str, Any]) -> str:
    """Where the measured images come from."""
    if "samples" not in result:
        return f"{result['checkpoint']['name']} ({result['weights']} weights)"
    return _with_left_out(result["samples"])


def _with_left_out(images: dict[str, Any]) -> str:
    """The name of a set of images, and what of it was left out."""
    from shared.data.images import ignored_text

    unreadable = f"{images['unreadable']} unreadable" if images["unreadable"] else ""
    left_out = ", ".join(text for text in (unreadable, ignored_text(images["ignored"])) if text)
    return f"{images['name']}{f' ({left_out})' if left_out else ''}"


def _check_source(checkpoint: Path | None, samples: str, size: int, given: list[str]) -> None:
    """Either a checkpoint or samples, and only what goes with them.

    Raises:
        InputError: naming the option.
    """
    from shared.errors import InputError

    if (checkpoint is None) == (not samples):
        raise InputError("give a checkpoint or --samples PATH" + (", not both" if samples else ""))
    if samples and given:
        raise InputError(f"{given[0]} goes with a checkpoint, not with --samples: leave it out")
    if size and not samples:
        raise InputError("--size goes with --samples: a checkpoint draws its own size")
