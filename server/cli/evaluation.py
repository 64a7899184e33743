"""`maskfed-server`: the commands that sample and measure. They import heavy packages when they run."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from shared.commandline import owned

if TYPE_CHECKING:
    from server.evaluation.drawing import Drawing

UNMARKED = 3
"""Exit code of `check` for a picture without a mark: neither success nor a wrong command."""
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a setting of the experiment: section.key=value; may be repeated."),
]
Raw = Annotated[bool, typer.Option("--raw", help="Use the weights of the last step instead of their moving average.")]
Batch = Annotated[int, typer.Option(min=0, help="Images to compute at a time; 0: as the experiment says.")]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda or cuda:1; default: a GPU if there is one.")]
Precision = Annotated[str, typer.Option(help="Number format to sample in: float32 or bfloat16.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this module to the coordinator's."""
    app.command()(sample)
    app.command()(check)
    app.command()(evaluate)
    app.command()(projection)


def sample(
    checkpoint: Annotated[
        Path, typer.Argument(help="Checkpoint folder, or a run directory for its newest checkpoint.")
    ],
    num: Annotated[
        int,
        typer.Option(
            "--num",
            "--num-images",
            min=1,
            help="How many images to generate (write --num-images under torchrun, which takes --num itself).",
        ),
    ] = 64,
    out: Annotated[
        Path,
        typer.Option(help="FILE.png for one grid, FILE.npy for a uint8 array, anything else for a folder of PNGs."),
    ] = Path("grid.png"),
    seed: Annotated[
        int | None,
        typer.Option(
            min=0, help="Seed of the first image; image k uses this seed + k. Default: the experiment's seed."
        ),
    ] = None,
    columns: Annotated[int, typer.Option(min=1, help="Columns of the grid.")] = 8,
    batch: Batch = 0,
    raw: Raw = False,
    precision: Precision = "float32",
    device: Device = "",
    overrides: Overrides = None,
) -> None:
    """Generate images. Image k depends on seed + k alone, not on batch size, number of GPUs or restarts."""
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


def check(
    images: Annotated[list[Path], typer.Argument(help="Pictures, or arrays (.npy) of `sample`.")],
) -> None:
    """Read the mark of generated pictures: kind, model, seed; exit code 3 where one has none."""
    from shared.storage.synthetic_mark import read_mark

    marks = {path: read_mark(path) for path in images}
    for path, mark in marks.items():
        typer.echo(f"{path}: {mark or 'no mark of a generated picture'}")
    if None in marks.values():
        raise typer.Exit(UNMARKED)


def evaluate(
    checkpoint: Annotated[
        Path, typer.Argument(help="Checkpoint folder, or a run directory for its newest checkpoint.")
    ],
    reference: Annotated[
        str,
        typer.Option(
            help="Images (folder, zip, cache, FILE.npy, synthetic:SITE:N), statistics A,B, FILE.npz:N with mu and "
            "sigma, or `federated` to compare with."
        ),
    ],
    extractor: Annotated[
        str,
        typer.Option(
            help="Network: inception-v3-compat, random-inception, onnx:FILE, clip-*, dinov2-*; default: as trained."
        ),
    ] = "",
    weights: Annotated[
        Path | None, typer.Option(help="Weights file of the feature network; default: download it.")
    ] = None,
    weights_sha256: Annotated[
        str, typer.Option(help="SHA-256 that your weights file must have, if it is not the published file.")
    ] = "",
    num: Annotated[
        int,
        typer.Option("--num", "--num-images", min=0, help="How many images to generate; 0: as the experiment says."),
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
        int, typer.Option(min=0, help="Give the distance an interval from this many resamples; 0: no interval.")
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
    out: Annotated[Path, typer.Option(help="File to write; send it to the sites.")],
    size: Annotated[int, typer.Option(min=8, help="Image size in pixels; the same as at the sites.")],
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
