"""`maskfed-server`: the commands that sample and measure. They import heavy packages when they run."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from server.evaluation.drawing import Drawing

Overrides = Annotated[list[str] | None, typer.Option("--set", help="section.key=value, replaces a setting.")]
Raw = Annotated[bool, typer.Option("--raw", help="The last step's weights instead of the moving average.")]
Batch = Annotated[int, typer.Option(min=0, help="Images per network call; 0: as the experiment says.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1; default: a GPU where there is one.")]
Precision = Annotated[str, typer.Option(help="What the network samples in: float32 or bfloat16.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this module to the coordinator's."""
    app.command()(sample)
    app.command()(evaluate)
    app.command()(projection)


def sample(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder, or a run directory: its newest.")],
    num: Annotated[int, typer.Option("--num", "--num-images", min=1, help="The second form for torchrun.")] = 64,
    out: Annotated[Path, typer.Option(help="FILE.png: a grid; FILE.npy: uint8 array; else a folder of PNGs.")] = Path(
        "grid.png"
    ),
    seed: Annotated[int | None, typer.Option(min=0, help="Of the first image; default: the experiment's.")] = None,
    columns: Annotated[int, typer.Option(min=1, help="Of the grid.")] = 8,
    batch: Batch = 0,
    raw: Raw = False,
    precision: Precision = "float32",
    device: Device = "",
    overrides: Overrides = None,
) -> None:
    """Sample images: image k is a function of seed + k, whatever the batch, the number of GPUs or restarts."""
    from server.evaluation.sample import SampleOptions
    from server.evaluation.sample import sample as run

    with _bar("sampling") as on_progress:
        options = SampleOptions(
            num_images=num,
            out=out,
            seed=seed,
            columns=columns,
            drawing=_drawing(batch, raw, precision, device, overrides, on_progress),
        )
        written = run(checkpoint, options)
    typer.echo(f"{written}: {num:,} images")


def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder, or a run directory: its newest.")],
    reference: Annotated[str, typer.Option(help="Folder, zip, cache, synthetic:SITE:N, statistics A,B or federated.")],
    extractor: Annotated[
        str,
        typer.Option(help="inception-v3-compat, random-inception, onnx:FILE, clip-*, dinov2-*; default: as trained."),
    ] = "",
    weights: Annotated[Path | None, typer.Option(help="File of the extractor's weights; default: download.")] = None,
    weights_sha256: Annotated[str, typer.Option(help="Digest that the file must have, if not the published one.")] = "",
    num: Annotated[int, typer.Option("--num", "--num-images", min=0, help="Generated images; 0: as trained.")] = 0,
    home: Annotated[
        Path, typer.Option("--home", envvar="MASKFED_SERVER_HOME", help="Coordinator's folder, for `federated`.")
    ] = Path("coordinator"),
    private: Annotated[bool, typer.Option("--private", help="`federated`: ask for statistics under DP.")] = False,
    noise: Annotated[float, typer.Option(help="Noise multiplier of --private.")] = 1.1,
    projection: Annotated[Path | None, typer.Option(help="Projection of the sites' private statistics.")] = None,
    bootstrap: Annotated[int, typer.Option(min=0, help="Resamples for the interval of the distance; 0: none.")] = 0,
    name: Annotated[str, typer.Option(help="Of the evaluation; default: the checkpoint's and the distance's.")] = "",
    out: Annotated[Path | None, typer.Option(help="Folder of the evaluation; default: below the run.")] = None,
    every_checkpoint: Annotated[bool, typer.Option("--all", help="All checkpoints of a run.")] = False,
    batch: Batch = 0,
    raw: Raw = False,
    precision: Precision = "float32",
    device: Device = "",
    overrides: Overrides = None,
) -> None:
    """Distance of N samples to a reference: Frechet distance, KID, precision and recall, as `result.json`."""
    from server.evaluation.evaluate import Options, evaluate_run
    from server.evaluation.evaluate import evaluate as run

    with _bar("images") as on_progress:
        options = Options(
            reference=reference,
            extractor=extractor,
            weights_file=weights,
            weights_sha256=weights_sha256,
            num_images=num,
            drawing=_drawing(batch, raw, precision, device, overrides, on_progress),
            bootstrap=bootstrap,
            projection=projection,
            home=home,
            release="dp" if private else "exact",
            noise_multiplier=noise,
            say=typer.echo,
            name=name,
            out=out,
        )
        files = evaluate_run(checkpoint, options) if every_checkpoint else [run(checkpoint, options)]
    for file in files:
        _show(file)


def projection(
    data: Annotated[str, typer.Option(help="PUBLIC images: folder, zip, cache, synthetic:SITE:N.")],
    out: Annotated[Path, typer.Option(help="Projection file, to send to the sites.")],
    size: Annotated[int, typer.Option(min=8, help="Side of the images in pixels, as at the sites.")],
    extractor: Annotated[str, typer.Option(help="Feature network.")] = "inception-v3-compat",
    weights: Annotated[Path | None, typer.Option(help="File of the extractor's weights; default: download.")] = None,
    dimensions: Annotated[int, typer.Option(min=1, help="Principal directions that are kept.")] = 64,
    device: Device = "",
) -> None:
    """Principal directions of public images, in which sites release private statistics."""
    from server.evaluation.drawing import pick_device
    from server.evaluation.reference import features_of_images
    from shared.data.image_cache import open_images
    from shared.evaluation.networks import load_extractor
    from shared.evaluation.private_statistics import make_projection, save_projection
    from shared.storage.chunks import rank_from_environment

    network = load_extractor(extractor, weights=weights, device=pick_device(device, rank_from_environment()))
    made = make_projection(features_of_images(open_images(data, size), network), network.space, dimensions)
    save_projection(made, out)
    typer.echo(f"{out}: {dimensions} directions of {network.space.extractor}, radius {made.radius:.6g}")


def _show(file: Path) -> None:
    import json

    if not file.exists():  # Another rank writes it.
        return
    result = json.loads(file.read_text(encoding="utf-8"))
    shown = [f"{name} {value:.6g}" for name, value in result["metrics"].items() if isinstance(value, float)]
    kind, weights = result["reference"]["release"], result["weights"]
    note = "" if kind == "own" else f", {kind} statistics"
    typer.echo(f"{file}: {', '.join(shown)}")
    if noise := result["noise"]:
        shown_noise = f"noise adds about {noise['bias']:.4g}, distances below {noise['resolution']:.4g} are noise"
        typer.echo(f"  private statistics: {shown_noise}{'' if noise['is_resolved'] else '; THIS ONE IS'}")
    typer.echo(
        f"  {result['num_images']:,} images of {result['checkpoint']['name']} ({weights} weights) against "
        f"{result['reference']['n']:,.0f} of {result['reference']['name']}{note}, {result['wall_seconds']:.0f} s"
    )


def _drawing(
    batch: int,
    raw: bool,
    precision: str,
    device: str,
    overrides: list[str] | None,
    on_progress: Callable[[int, int], None],
) -> "Drawing":
    """What `sample` and `evaluate` have in common."""
    from server.evaluation.drawing import Drawing
    from shared.errors import InputError

    if precision not in ("float32", "bfloat16"):
        raise InputError(f"--precision {precision!r}: give float32 or bfloat16")
    known: Literal["float32", "bfloat16"] = "bfloat16" if precision == "bfloat16" else "float32"
    return Drawing(batch, "model" if raw else "ema", known, tuple(overrides or ()), device, on_progress)


def _bar(description: str) -> AbstractContextManager[Callable[[int, int], None]]:
    from server.training.progress_bars import decoding_bar

    return decoding_bar(description)
