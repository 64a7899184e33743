"""`maskfed-client audit`: is this model safe to release, by this site's own images?"""

from pathlib import Path
from typing import Annotated

import typer

from client.settings import find_home, load_settings

HomeOption = Annotated[Path | None, typer.Option("--home", envvar="MASKFED_CLIENT_HOME", help="The site's folder.")]


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command()(audit)


def audit(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder or run directory of the model.")],
    reference: Annotated[list[Path], typer.Option(help="Public checkpoint that never saw this site's images.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the verdicts that the coordinator gets.")] = None,
    figures: Annotated[bool, typer.Option("--figures", help="Release the figures too: charged, without DP.")] = False,
    extractor: Annotated[str, typer.Option(help="Feature space of the copy test: pixels, onnx:FILE, ...")] = "pixels",
    num: Annotated[int, typer.Option(min=1, help="Generated images of the copy test.")] = 1000,
    control_steps: Annotated[int, typer.Option(min=1, help="Training of the control model, in steps.")] = 1000,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    overrides: Annotated[list[str] | None, typer.Option("--set", help="section.key=value of the experiment.")] = None,
    home: HomeOption = None,
) -> None:
    """Attack a model with this site's images: membership inference, copies. Only pass or fail may leave."""
    from client.app import epsilon_of
    from client.audit import AuditOptions
    from client.audit import audit as run
    from client.verdicts import release_verdicts

    place = find_home(home)
    settings = load_settings(place)
    options = AuditOptions(
        checkpoint=checkpoint,
        references=tuple(reference),
        extractor=extractor,
        num_images=num,
        control_steps=control_steps,
        overrides=tuple(overrides or ()),
        device=device,
        on_stage=lambda stage: typer.echo(f"{stage} ...", err=True),
    )
    verdicts = run(place, settings, options)
    for verdict in verdicts:
        shown = ", ".join(
            f"{name} {value:.4g}" for name, value in verdict.figures.items() if isinstance(value, int | float)
        )
        typer.echo(f"{verdict.audit}: {'pass' if verdict.passed else f'FAIL, {verdict.reason}'} ({shown})")
    typer.echo(f"figures and the closest pairs, for your eyes only: {place.path / 'audits'}")
    if out is not None:
        release_verdicts(place, settings, verdicts, out, figures=figures, epsilon_of=epsilon_of)
        typer.echo(f"verdicts for the coordinator: {out}")
    if not all(verdict.passed for verdict in verdicts):
        raise typer.Exit(1)
