"""`maskfed-server`: the commands around models and images."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from shared.commandline import JsonOption, tell_json

if TYPE_CHECKING:
    from shared.experiment.config import Experiment

data = typer.Typer(no_args_is_help=True, help="Prepare image sets.")
experiments = typer.Typer(no_args_is_help=True, help="Show the experiment recipes that come with maskfed.")

PROBE_SECONDS = 1.0
LONG_SECONDS = 7 * 86_400.0
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a setting of the experiment: section.key=value; may be repeated."),
]


def register(app: typer.Typer) -> None:
    """Add the commands of this module to the coordinator's."""
    app.command()(train)
    app.command("import-checkpoint")(import_checkpoint)
    app.command()(export)
    app.add_typer(data, name="data")
    app.add_typer(experiments, name="experiments")


def train(
    experiment: Annotated[str, typer.Argument(help="Experiment file, or the name of a recipe.")],
    data: Annotated[Path, typer.Option(help="Images: folder, zip, cache, or synthetic:SITE:NUMBER.")],
    out: Annotated[
        Path,
        typer.Option(
            help="Run directory. If it holds an unfinished run of the same experiment, training continues there."
        ),
    ],
    init: Annotated[
        Path | None,
        typer.Option(
            help="Start from the averaged weights of this checkpoint or run; default: the experiment's train.init."
        ),
    ] = None,
    accept_other_data: Annotated[
        bool,
        typer.Option(
            "--accept-other-data", help="Go on although the images are not those the run began with; it is recorded."
        ),
    ] = False,
    overrides: Overrides = None,
) -> None:
    """Train a model on public images. The experiment says which patches are masked. torchrun uses several GPUs."""
    from server.training.train import train as run_stage
    from shared.experiment.config import load_experiment
    from shared.experiment.recipes import find_experiment

    loaded = load_experiment(find_experiment(experiment), overrides)

    def tell_plan(resolved: "Experiment") -> None:
        for line in training_plan(resolved):
            typer.echo(line, err=True)

    run = run_stage(loaded, data, out, init, accept_other_data=accept_other_data, on_ready=tell_plan)
    typer.echo(f"run {run.path}: {run.latest}")


def training_plan(experiment: "Experiment") -> list[str]:
    """How long a training takes on this machine, from a probe of a second; nothing under torchrun.

    A training of more than a week is told what else there is.
    """
    import os

    from shared.planning.speed_probe import images_per_second
    from shared.planning.workload import duration

    if "WORLD_SIZE" in os.environ:
        return []
    options, rate = experiment.train, images_per_second(experiment, PROBE_SECONDS)
    images = options.steps * options.batch
    seconds = images / rate
    told = [
        f"{options.steps:,} steps of {options.batch} images: {images:,} images at {rate:.1f} per second, "
        f"{duration(seconds)} here"
    ]
    if seconds > LONG_SECONDS:
        stage = "reproduce32-T-msm" if options.objective == "msm" else "reproduce32-T-dsm"
        told.append(
            f"that is long: take a machine with a GPU, `--set train.steps=N`, or a smaller recipe such as {stage}"
        )
    return told


def import_checkpoint(
    file: Annotated[Path, typer.Argument(help="MaskDM's or U-ViT's .pt, .pth or .safetensors; a diffusers folder.")],
    out: Annotated[Path, typer.Option(help="Checkpoint folder to write.")],
    schedule: Annotated[
        Literal["linear", "cosine"] | None, typer.Option(help="Noise schedule; default: what the file's tables say.")
    ] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Attention heads; default: those of the size.")] = None,
) -> None:
    """Import a checkpoint of the authors' MaskDM code or of U-ViT, or a folder that was exported for diffusers."""
    from server.training.foreign import checkpoints, diffusers_folder

    if diffusers_folder.is_folder(file):
        made = diffusers_folder.import_folder(file, out, takes_all=schedule is None and heads is None)
    else:
        made = checkpoints.import_checkpoint(file, out, schedule=schedule, num_heads=heads)
    typer.echo(f"{out}: size {made.model.size}, {made.model.image_size} px, patch {made.model.patch_size}")


def export(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder, or run directory for its newest one.")],
    out: Annotated[Path, typer.Option(help="File to write (.pt, .pth or .safetensors); for diffusers a new folder.")],
    to: Annotated[
        Literal["maskdm", "uvit", "diffusers"], typer.Option(help="Program to write for: maskdm, uvit or diffusers.")
    ] = "maskdm",
) -> None:
    """Export a checkpoint for the authors' MaskDM code, for U-ViT or for diffusers."""
    if to == "diffusers":
        from server.training.foreign.diffusers_folder import export_folder

        export_folder(checkpoint, out)
    else:
        from server.training.foreign.checkpoints import export_checkpoint

        export_checkpoint(checkpoint, out, to)
    typer.echo(f"{out}: for {to}")


@data.command("cache")
def cache_images(
    source: Annotated[Path, typer.Argument(help="Folder or zip of images.")],
    size: Annotated[int, typer.Option(min=8, max=4096, help="Image size in pixels.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the cache; default: beside the source.")] = None,
    identities: Annotated[Path | None, typer.Option(help="Text file with `<file name> <identity>` lines.")] = None,
    crop: Annotated[
        int, typer.Option(min=0, help="Cut a centred square of this many source pixels; 0: the largest that fits.")
    ] = 0,
    workers: Annotated[int | None, typer.Option(min=1, help="How many processes to use; default: all cores.")] = None,
    allow_unreadable: Annotated[
        bool, typer.Option("--allow-unreadable", help="Go on even if more than 1 percent of the files cannot be read.")
    ] = False,
    retry_unreadable: Annotated[
        bool, typer.Option("--retry-unreadable", help="Try the files again that could not be read before.")
    ] = False,
) -> None:
    """Decode images once, for `train --data` to read. After an interruption run it again: it continues."""
    from server.training.progress_bars import decoding_bar
    from shared.data.image_cache import BuildOptions, build_cache
    from shared.data.images import ignored_text

    folder = out or _default_cache(source, size, crop)
    options = BuildOptions(identities, crop, allow_unreadable, retry_unreadable)
    with decoding_bar() as on_progress:
        cache = build_cache(source, folder, size, workers, options, on_progress=on_progress)
    persons = "" if cache.persons is None else f" of {len(set(cache.persons.tolist())):,} persons"
    ignored = f", {ignored_text(cache.ignored)}" if cache.ignored else ""
    typer.echo(f"{folder}: {len(cache):,} images{persons}, {cache.num_unreadable} unreadable files left out{ignored}")


def _default_cache(source: Path, size: int, crop: int = 0) -> Path:
    """Where `data cache` puts a cache: beside the source, under a name that no other source, size or crop has.

    Raises:
        InputError: the root of the file system, which has nothing beside it.
    """
    from shared.errors import InputError

    # `.` and `..` have names, too; a link keeps its own.
    place = source.absolute() if source.name not in ("", "..") else source.resolve()
    if not place.name:
        raise InputError(f"images {source}: nothing lies beside it; name the folder of the cache with --out")
    return place.with_name(f"{place.name}-{size}{f'-crop{crop}' if crop else ''}.cache")


@experiments.command("list")
def list_experiments(as_json: JsonOption = False) -> None:
    """List the recipes and what each is for."""
    from shared.experiment.recipes import describe, recipe_names

    if as_json:
        tell_json([{"name": name, "description": describe(name)} for name in recipe_names()])
        return
    width = max(map(len, recipe_names()))
    for name in recipe_names():
        typer.echo(f"{name:<{width}}  {describe(name)}")


@experiments.command("show")
def show_experiment(
    name: Annotated[str, typer.Argument(help="Name of a recipe, or an experiment file.")],
    overrides: Overrides = None,
    *,
    resolved: Annotated[bool, typer.Option("--resolved", help="Show every setting, defaults included.")] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="The same, each setting with its meaning, range and default above it.")
    ] = False,
) -> None:
    """Print a recipe, for example to start an experiment file of your own."""
    from shared.experiment.config import load_experiment
    from shared.experiment.recipes import find_experiment

    path = find_experiment(name)
    experiment = load_experiment(path, overrides)
    if everything:
        from shared.experiment.settings_reference import to_annotated_toml

        typer.echo(to_annotated_toml(experiment).rstrip())
        return
    typer.echo((experiment.to_toml() if resolved or overrides else path.read_text(encoding="utf-8")).rstrip())


@experiments.command("schema")
def experiment_schema() -> None:
    """Print a JSON schema of experiment files, for editors that check and complete TOML."""
    from shared.experiment.settings_reference import json_schema

    typer.echo(json_schema().rstrip())
