"""`maskfed-server`: the commands before a model leaves: audits at the sites, and the gate."""

from pathlib import Path
from typing import Annotated

import typer

from shared.commandline import JsonOption, owned, tell_json


def register(app: typer.Typer) -> None:
    """Add the commands of this module to the coordinator's."""
    app.command()(audit)
    app.command()(release)
    app.command()(verify)


def audit(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder of a run, or a run directory: its newest.")],
    reference: Annotated[
        list[str] | None,
        typer.Option(
            help="Public checkpoint trained without any site's images, to compare with; may be "
            "repeated, the model's start first. A shipped model by its name."
        ),
    ] = None,
    public: Annotated[
        str,
        typer.Option(
            help="Public images: a copy of the first reference is fine-tuned on them and used as one more reference."
        ),
    ] = "",
    public_steps: Annotated[int, typer.Option(min=1, help="Steps of the fine-tuning on --public.")] = 500,
    site: Annotated[
        list[str] | None,
        typer.Option(
            help="Alias to ask; may be repeated. Default: the sites that took part in the run, else all sites online."
        ),
    ] = None,
    canaries: Annotated[
        bool, typer.Option("--canaries", help="Ask for the canary audit of each site's DP-SGD: costs no privacy.")
    ] = False,
    deadline: Annotated[float, typer.Option(min=1, help="Seconds until sites must have answered.")] = 4 * 3600.0,
    home: Annotated[
        Path, typer.Option("--home", envvar="MASKFED_SERVER_HOME", callback=owned(), help="The coordinator's folder.")
    ] = Path("coordinator"),
) -> None:
    """Ask the sites to attack a model with their own images. Each site's policy says how, and at what cost."""
    from server.federation.fleet.registry import check_home
    from server.federation.starting_point import find_init
    from server.release.audit_question import AuditPlan
    from server.release.audit_sites import ask_audits

    check_home(home)
    plan = AuditPlan(
        references=tuple(map(find_init, reference or ())),
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
    verdict: Annotated[
        list[Path] | None,
        typer.Option(help="Verdict file that a site sent you; may be repeated. It is copied into the run."),
    ] = None,
    override: Annotated[str, typer.Option(help="Reason to release against the gate; printed in the model card.")] = "",
    license_text: Annotated[str, typer.Option("--license", help="Licence of the weights.")] = "",
    name_sites: Annotated[
        bool, typer.Option("--name-sites", help="Name the sites in the card; default: they are numbered.")
    ] = False,
) -> None:
    """Write a model with its model card. Refused while required evidence is missing or beyond its limits."""
    from server.release.evidence import FILE, signing_key
    from server.release.gate import LICENSE
    from server.release.gate import release as run
    from server.release.verdict_files import add_verdicts
    from shared.messages.signature import public_text
    from shared.storage.checkpoint import resolve_checkpoint

    if verdict:
        add_verdicts(resolve_checkpoint(checkpoint).resolve().parent.parent, verdict)
    written = run(checkpoint, out, override=override, license_text=license_text or LICENSE, name_sites=name_sites)
    typer.echo(str(written))
    if key := signing_key(resolve_checkpoint(checkpoint).resolve().parent.parent):
        typer.echo(f"{written / FILE}: check it elsewhere with `maskfed-server verify FILE --key {public_text(key)}`")


def verify(
    file: Annotated[Path, typer.Argument(help="Evidence that a coordinator or a site has signed (.zip).")],
    key: Annotated[str, typer.Option(help="Public key of the signer, 64 hexadecimal digits: ask it by phone.")],
    as_json: JsonOption = False,
) -> None:
    """Check evidence from elsewhere: whether this key signed it, and every byte. Exit code 2 if not."""
    from server.release.evidence import check

    lines = check(file, key)
    if as_json:
        tell_json({"is_verified": True, "file": str(file), "key": key, "contents": lines})
        return
    for line in lines:
        typer.echo(line)
    typer.echo("VERIFIED")
