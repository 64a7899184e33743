"""`maskfed-server`: the commands before a model leaves: audits at the sites, and the gate."""

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the commands of this module to the coordinator's."""
    app.command()(audit)
    app.command()(release)


def audit(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder of a run, or a run directory: its newest.")],
    reference: Annotated[
        list[Path] | None, typer.Option(help="Public checkpoint that saw no site's images; the model's start first.")
    ] = None,
    public: Annotated[
        str,
        typer.Option(help="PUBLIC images: a copy of the first reference is fine-tuned on them as one more reference."),
    ] = "",
    public_steps: Annotated[int, typer.Option(min=1, help="Steps of the fine-tuning on --public.")] = 500,
    site: Annotated[
        list[str] | None, typer.Option(help="Alias to ask; default: who took part, or everybody online.")
    ] = None,
    canaries: Annotated[
        bool, typer.Option("--canaries", help="Ask for the canary audit of each site's DP-SGD: costs no privacy.")
    ] = False,
    deadline: Annotated[float, typer.Option(min=1, help="Seconds until sites must have answered.")] = 4 * 3600.0,
    home: Annotated[
        Path, typer.Option("--home", envvar="MASKFED_SERVER_HOME", help="The coordinator's folder.")
    ] = Path("coordinator"),
) -> None:
    """Ask the sites to attack a model with their own images: how, and at what cost, is each site's policy."""
    from server.federation.fleet.registry import check_home
    from server.release.audit_question import AuditPlan
    from server.release.audit_sites import ask_audits

    check_home(home)
    plan = AuditPlan(
        references=tuple(reference or ()),
        public=public,
        public_steps=public_steps,
        canaries=canaries,
        sites=tuple(site or ()),
        deadline_seconds=deadline,
    )
    for file in ask_audits(home, checkpoint, plan, typer.echo):
        typer.echo(str(file))


def release(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder of a run, or a run directory: its newest.")],
    out: Annotated[Path, typer.Option(help="New folder: weights, experiment, model card.")],
    verdict: Annotated[list[Path] | None, typer.Option(help="Audit verdict file of a site; a copy is kept.")] = None,
    override: Annotated[str, typer.Option(help="Reason to release against the gate; printed in the model card.")] = "",
    license_text: Annotated[str, typer.Option("--license", help="Licence of the weights.")] = "",
) -> None:
    """Release a model with its evidence; refused while a required result is missing or bad."""
    from server.release.gate import LICENSE
    from server.release.gate import release as run
    from server.release.verdict_files import add_verdicts
    from shared.storage.checkpoint import resolve_checkpoint

    if verdict:
        add_verdicts(resolve_checkpoint(checkpoint).resolve().parent.parent, verdict)
    typer.echo(str(run(checkpoint, out, override=override, license_text=license_text or LICENSE)))
