"""`maskfed-server`: the commands that run studies and write reports. They import heavy packages when they run."""

import itertools
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

END_IMAGES = 5000
"""As an FID needs them at least."""


def register(app: typer.Typer) -> None:
    """Add the commands of this module to the coordinator's."""
    app.command()(reproduce)
    app.command()(report)
    app.command()(toy)


def reproduce(
    study: Annotated[
        str,
        typer.Argument(
            help="acceleration, transfer, federated, key-factors, fast, private, or a study file of your own."
        ),
    ],
    scale: Annotated[str, typer.Option(help="How large: small, cpu, gpu or paper.")] = "cpu",
    arm: Annotated[list[str] | None, typer.Option(help="Arm to run; may be repeated. Default: all, in order.")] = None,
    public: Annotated[str, typer.Option(help="Folder or zip of public images; default: synthetic faces.")] = "",
    private: Annotated[str, typer.Option(help="Folder or zip, a folder per person; default: synthetic faces.")] = "",
    extractor: Annotated[
        list[str] | None,
        typer.Option(
            help="Feature network, as in evaluate; may be repeated: the first chooses the point that is reported."
        ),
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="Weights file of the Inception network.")] = None,
    weights_sha256: Annotated[
        str, typer.Option(help="Digest of --weights, where it is not the published file; results are named by it.")
    ] = "",
    end_extractor: Annotated[
        list[str] | None,
        typer.Option(help="Feature network of one more measurement at the end of each arm; may be repeated."),
    ] = None,
    end_images: Annotated[
        int | None, typer.Option(min=2, help="Images generated for --end-extractor. Default: 5000.")
    ] = None,
    seed: Annotated[
        list[int] | None,
        typer.Option(min=0, help="Seed of the training; may be repeated: the page shows the spread. Default: 0."),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for all runs. After an interruption the same command continues there.")
    ] = Path("runs/reproduce"),
    results: Annotated[Path | None, typer.Option(help="Folder to store results in; default: server/results.")] = None,
    device: Annotated[str, typer.Option(help="Where to sample: cpu or cuda; default: a GPU if there is one.")] = "",
) -> None:
    """Repeat the paper's experiments, arm by arm. The numbers go to server/results."""
    from server.studies.run.arm_settings import ArmSettings
    from server.studies.run.estimate import estimate
    from server.studies.run.reproduce import run_arm
    from server.studies.stored_results import FOLDER
    from server.studies.study_files import arms_at, load_study
    from server.training.progress_bars import decoding_bar
    from shared.errors import InputError

    if end_images and not end_extractor:
        raise InputError(f"--end-images {end_images} measures nothing: give --end-extractor NAME, or leave it out")
    loaded = load_study(study)
    names, seeds = arm or arms_at(loaded, study, scale), tuple(dict.fromkeys(seed or [0]))
    at_end = (end_images or END_IMAGES) if end_extractor else 0
    typer.echo(estimate(loaded, Path(study).stem, names, scale, out, seeds, end_images=at_end))
    for each, name in itertools.product(seeds, names):
        with decoding_bar("images") as on_progress:
            settings = ArmSettings(
                public=public,
                private=private,
                extractors=tuple(extractor or ("random-inception",)),
                weights=weights,
                weights_sha256=weights_sha256,
                root=out,
                results=results or FOLDER,
                end_extractors=tuple(end_extractor or ()),
                end_images=at_end,
                seed=each,
                device=device,
                say=typer.echo,
                on_progress=on_progress,
            )
            stored = run_arm(study, name, scale, settings)
        if stored is None:
            typer.echo(f"{study}/{name} is not finished: run the same command again to continue", err=True)
            sys.exit(1)
        typer.echo(f"{stored}")


def report(
    runs: Annotated[list[Path] | None, typer.Argument(help="Run directories; give several to compare them.")] = None,
    out: Annotated[Path | None, typer.Option(help="HTML file to write; default: report.html in the run.")] = None,
    results: Annotated[
        bool, typer.Option("--results", help="Write RESULTS.md and its plots from the stored results instead.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="With --results: write nothing, exit with 1 if the page is out of date.")
    ] = False,
) -> None:
    """Write a report of runs as one HTML page: distances, samples, who took part, privacy, provenance."""
    from server.report.build import report as write
    from shared.errors import InputError

    if results or check:
        _report_results(runs, check)
        return
    if not runs:
        raise InputError("report needs a run directory, or --results for the page of all studies")
    typer.echo(str(write(runs, out)))


def _report_results(runs: list[Path] | None, check: bool) -> None:
    """`report --results`: write the page of all studies, or only say whether it is up to date.

    Raises:
        InputError: run directories were given, too, or a stored result is damaged.
    """
    from server.studies.page.results_page import make_pages
    from shared.errors import InputError

    if runs:
        raise InputError(f"report --results takes no run directory, but got {runs[0]}: leave out one of the two")
    pages = make_pages()
    if not check:
        pages.write()
    for path in pages.stale() if check else pages.texts:
        typer.echo(f"{'stale: ' if check else ''}{path}")
    if check and pages.stale():
        sys.exit(1)


def toy(
    name: Annotated[Literal["swiss-roll", "rose"], typer.Argument(help="Which of the paper's toy distributions.")],
    out: Annotated[
        Path, typer.Option(help="Folder for the figure and the distances; RESULTS.md shows those in results/toys.")
    ],
    seed: Annotated[
        list[int] | None, typer.Option(min=0, help="Seed of all random numbers; may be repeated. Default: 0, 1 and 2.")
    ] = None,
    operations: Annotated[
        list[int] | None,
        typer.Option(min=4, help="Length in denoising steps; may be repeated. Default: 500, 2000 and 8000."),
    ] = None,
) -> None:
    """Repeat the paper's Figure 2 in minutes: masked pre-training against training from scratch at equal operations."""
    from server.studies.toys import BUDGETS, run_toy

    budgets = tuple(sorted(set(operations))) if operations else BUDGETS
    result = run_toy(name, out, seeds=tuple(dict.fromkeys(seed or (0, 1, 2))), budgets=budgets)
    typer.echo(f"{out / name}.png: energy distance to fresh data, median of {len(result.runs)} seeds")
    for place, point in enumerate(result.runs[0].points):
        proxy, both, scratch = (result.median(what, place) for what in ("proxy", "two_stages", "scratch"))
        typer.echo(
            f"  {point.operations:>5} steps' operations: masked stage alone {proxy:.4f}, both stages {both:.4f}, from "
            f"scratch {scratch:.4f}"
        )
    first = result.runs[0]
    typer.echo(f"  two draws of the data {first.floor:.4f}, independent coordinates {first.independent:.4f}")
