"""The commands that decide: which code and experiments may run here, and with whom updates are added up."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from client.home import Home, find_home
from shared.commandline import JsonOption, owned, tell_json
from shared.errors import InputError

if TYPE_CHECKING:
    from client.offers.waiting import Waiting
    from shared.experiment.config import Experiment

HomeOption = Annotated[
    Path | None,
    typer.Option(
        "--home", envvar="MASKFED_CLIENT_HOME", callback=owned("site"), help="The site's folder; default: ./site."
    ),
]
approvals = typer.Typer(no_args_is_help=True, help="Decide which code and experiments may run here.")


def register(app: typer.Typer) -> None:
    """Add the command group to the program."""
    app.add_typer(approvals, name="approve")


@approvals.command("list")
def approve_list(
    home: HomeOption = None,
    probe_seconds: Annotated[
        float,
        typer.Option(min=0, max=60, help="How long to measure this machine for what waits; 0: do not."),
    ] = 1.0,
    as_json: JsonOption = False,
) -> None:
    """Show what is approved or refused, and each experiment that waits for you with what it does and costs."""
    from client.offers.in_words import waiting_facts
    from client.offers.waiting import waiting
    from client.policy.approval import read_approved
    from client.secure.rosters import pending_rosters
    from shared.storage.code_digest import installed_digest

    place = find_home(home)
    approved = read_approved(place)
    if as_json:
        kinds = {kind: sorted(digests) for kind, digests in vars(approved).items()}
        told = [waiting_facts(place, each, probe_seconds) for each in waiting(place)]
        rosters = [path.stem for path in pending_rosters(place)]
        tell_json({**kinds, "installed_code": installed_digest(), "waiting": told, "rosters": rosters})
        return
    for digest in sorted(approved.code):
        typer.echo(f"code {digest}{' (installed)' if digest == installed_digest() else ''}")
    if installed_digest() not in approved.code:
        typer.echo(f"installed code {installed_digest()} is NOT approved: `maskfed-client approve code`")
    for kind, digests in (
        ("experiment", approved.experiments),
        ("projection", approved.projections),
        ("reference", approved.references),
        ("refused experiment", approved.refused),
        ("peer", approved.peers),
    ):
        for digest in sorted(digests):
            typer.echo(f"{kind} {digest}")
    for path in pending_rosters(place):
        typer.echo(f"roster of run {path.stem} waits: `maskfed-client approve roster {path.stem}`")
    found = waiting(place)
    for each in found:
        _tell_waiting(place, each, probe_seconds)
    if found:
        typer.echo("decide: `maskfed-client approve experiment NUMBER`, or `approve refuse NUMBER --reason TEXT`")


def _tell_waiting(place: Home, each: "Waiting", probe_seconds: float) -> None:
    from client.offers.in_words import waiting_facts
    from client.offers.waiting import told
    from client.policy.approval import pending_file

    typer.echo(f"\nwaiting {each.number}: experiment {each.digest}")
    typer.echo(f"  all of it: {pending_file(place, each.digest)}")
    for line in told(waiting_facts(place, each, probe_seconds)):
        typer.echo(f"  {line}")


@approvals.command("code")
def approve_code(
    home: HomeOption = None, yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False
) -> None:
    """Approve the client code installed here, after showing which files changed since the last approval."""
    from client.operator.installed_code import approve_installed, changed_files
    from shared.storage.code_digest import installed_digest

    place = find_home(home)
    digest = installed_digest()
    for line in changed_files(place):
        typer.echo(line)
    if not yes:
        typer.confirm(f"approve the installed client code {digest}?", abort=True)
    approve_installed(place)
    typer.echo(f"approved code {digest}")


@approvals.command("experiment")
def approve_experiment(
    experiment: Annotated[
        str, typer.Argument(help="Experiment file or recipe, a digest, or the number or beginning of one that waits.")
    ],
    home: HomeOption = None,
    override: Annotated[
        list[str] | None,
        typer.Option("--set", help="For a file: a setting that the coordinator changes, section.key=value."),
    ] = None,
) -> None:
    """Approve an experiment, before or after it was asked for; what it does and costs is printed."""
    from client.offers.in_words import in_words
    from client.policy.approval import approve
    from client.records.journal import Journal
    from client.settings import load_settings
    from shared.messages.training import experiment_digest

    place = find_home(home)
    found = _named_experiment(place, experiment, override)
    digest = experiment if found is None else experiment_digest(found)
    approve(place, "experiment", digest)
    if found is not None:
        for line in in_words(place, load_settings(place), found):
            typer.echo(line)
    Journal(place.journal).write("approval", what="experiment", digest=digest)
    typer.echo(f"approved experiment {digest}")


def _named_experiment(place: Home, name: str, override: list[str] | None) -> "Experiment | None":
    """The experiment of a file, a recipe or a digest that waits; None for a digest that nobody has asked for.

    Raises:
        InputError: neither, or settings for a digest.
    """
    from client.offers.waiting import find_waiting
    from shared.experiment.config import load_experiment
    from shared.experiment.recipes import find_experiment, recipe_names
    from shared.messages.agreement.plan import resolve

    if Path(name).is_file() or name in recipe_names():
        return resolve(load_experiment(find_experiment(name), override))
    if override:
        raise InputError(f"--set goes with an experiment file or a recipe, {name[:70]!r} is none")
    found = find_waiting(place, name)
    return found.experiment if found else None


@approvals.command("refuse")
def approve_refuse(
    experiment: Annotated[str, typer.Argument(help="Number or beginning of one that waits, or any digest.")],
    reason: Annotated[str, typer.Option(help="Why, for your own record; it does not leave.")] = "",
    home: HomeOption = None,
) -> None:
    """Refuse an experiment: it waits no more, and an approval of it is taken back. `approve experiment` undoes it.

    Where policy lets any experiment run, each one needs your approval from then on: a refused plan with another seed
    is another experiment.
    """
    from client.offers.waiting import find_waiting
    from client.policy.approval import approve
    from client.records.journal import Journal

    place = find_home(home)
    found = find_waiting(place, experiment)
    digest = found.digest if found else experiment
    if not found and len(experiment) != 64:
        raise InputError(f"no experiment of that number or digest waits: {experiment[:70]!r}; see `approve list`")
    approve(place, "refused", digest)
    Journal(place.journal).write("approval", what="refused", digest=digest, reason=reason)
    typer.echo(f"refused experiment {digest}")


@approvals.command("projection")
def approve_projection(
    digest: Annotated[str, typer.Argument(help="Digest that a refused question for statistics has named.")],
    home: HomeOption = None,
) -> None:
    """Approve the coordinator's projection of private statistics by its digest."""
    _approve(find_home(home), "projection", digest)


@approvals.command("reference")
def approve_reference(
    digest: Annotated[str, typer.Argument(help="SHA-256 that a refused question for an audit has named.")],
    home: HomeOption = None,
) -> None:
    """Approve public weights as the reference that audits compare a model with."""
    _approve(find_home(home), "reference", digest)


@approvals.command("roster")
def approve_roster(
    run: Annotated[str, typer.Argument(help="Run whose roster waits; `approve list` names it.")],
    home: HomeOption = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Approve the sites of a run with masked updates, after showing their names and the prints of their keys.

    The coordinator could have made them up: compare each print with its site, by phone.
    """
    from client.policy.approval import approve
    from client.records.journal import Journal
    from client.secure.rosters import find_pending
    from client.settings import load_settings

    place = find_home(home)
    own, peers = load_settings(place).alias, find_pending(place, run)
    for peer in peers:
        typer.echo(f"{peer.alias:32} {peer.signing_key}{' (this site)' if peer.alias == own else ''}")
    if not yes:
        typer.confirm(f"may updates of this site be added to those of these {len(peers) - 1} others?", abort=True)
    for peer in peers:
        approve(place, "peer", peer.digest)
    (place.rosters / f"{run}.json").unlink(missing_ok=True)
    Journal(place.journal).write("approval", what="roster", run=run, peers=[peer.alias for peer in peers])
    typer.echo(f"approved {len(peers)} sites: any of them, in any run")


def _approve(place: Home, kind: Literal["projection", "reference"], digest: str) -> None:
    from client.policy.approval import approve
    from client.records.journal import Journal

    approve(place, kind, digest)
    Journal(place.journal).write("approval", what=kind, digest=digest)
    typer.echo(f"approved {kind} {digest}")


@approvals.command("revoke")
def approve_revoke(digest: Annotated[str, typer.Argument(help="Digest.")], home: HomeOption = None) -> None:
    """Take an approval back."""
    from client.policy.approval import revoke
    from client.records.journal import Journal

    place = find_home(home)
    if not revoke(place, digest):
        raise InputError(f"{digest[:70]!r} is not approved: see `maskfed-client approve list`")
    Journal(place.journal).write("approval", what="revoked", digest=digest)
    typer.echo(f"revoked {digest}")
