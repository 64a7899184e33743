"""`maskfed-server`: the commands that draw images, and the options of all that do. They import heavy packages late."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from shared.commandline import JsonOption, tell_json

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

    with progress("sampling") as on_progress:
        options = SampleOptions(
            num_images=num,
            out=out,
            seed=seed,
            columns=columns,
            drawing=drawing_of(batch, raw, precision, device, overrides, on_progress),
        )
        written = run(checkpoint, options)
    typer.echo(f"{written}: {num:,} images")


def check(
    images: Annotated[list[Path], typer.Argument(help="Pictures, or arrays (.npy) of `sample`.")],
    as_json: JsonOption = False,
) -> None:
    """Read the mark of generated pictures: kind, model, seed. Exit code 3 if a picture has no mark."""
    from shared.storage.synthetic_mark import read_mark

    marks = {path: read_mark(path) for path in images}
    if as_json:
        tell_json([{"file": str(path), "mark": mark and vars(mark)} for path, mark in marks.items()])
    for path, mark in marks.items() if not as_json else []:
        typer.echo(f"{path}: {mark or 'no mark of a generated picture'}")
    if None in marks.values():
        raise typer.Exit(UNMARKED)


def drawing_of(
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


def progress(description: str) -> AbstractContextManager[Callable[[int, int], None]]:
    """A progress bar on a terminal."""
    from server.training.progress_bars import decoding_bar

    return decoding_bar(description)
