"""The commands that show and decide: journal, approvals."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from client.settings import Home, find_home
from shared.commandline import owned
from shared.errors import InputError

if TYPE_CHECKING:
    from shared.experiment.config import Experiment

HomeOption = Annotated[
    Path | None,
    typer.Option(
        "--home", envvar="MASKFED_CLIENT_HOME", callback=owned("site"), help="The site's folder; default: ./site."
    ),
]
journal = typer.Typer(no_args_is_help=True, help="See what was asked, decided and released.")
approvals = typer.Typer(no_args_is_help=True, help="Decide which code and experiments may run here.")
APPROVED_FILES = "approved-files.json"


def register(app: typer.Typer) -> None:
    """Add the command groups to the program."""
    app.add_typer(journal, name="journal")
    app.add_typer(approvals, name="approve")


@journal.command("show")
def journal_show(
    home: HomeOption = None,
    last: Annotated[int, typer.Option(min=1, help="How many of the newest entries to show.")] = 50,
) -> None:
    """Print the newest requests, decisions and releases."""
    from client.operator.status import event_line
    from client.records.journal import Journal

    for entry in Journal(find_home(home).journal).entries()[-last:]:
        typer.echo(event_line(entry))


@journal.command("verify")
def journal_verify(home: HomeOption = None) -> None:
    """Check that no line was changed or lost."""
    from client.records.journal import Journal

    place = find_home(home)
    typer.echo(f"{place.journal}: {len(Journal(place.journal).entries())} entries, unbroken")


@approvals.command("list")
def approve_list(home: HomeOption = None) -> None:
    """Show what is approved, and which experiments wait for you."""
    from client.policy.approval import pending, read_approved
    from shared.storage.code_digest import installed_digest

    place = find_home(home)
    approved = read_approved(place)
    for digest in sorted(approved.code):
        typer.echo(f"code {digest}{' (installed)' if digest == installed_digest() else ''}")
    if installed_digest() not in approved.code:
        typer.echo(f"installed code {installed_digest()} is NOT approved: `maskfed-client approve code`")
    for kind, digests in (
        ("experiment", approved.experiments),
        ("projection", approved.projections),
        ("reference", approved.references),
    ):
        for digest in sorted(digests):
            typer.echo(f"{kind} {digest}")
    for path in pending(place):
        typer.echo(f"waiting: experiment {path.stem}, read it in {path}")


@approvals.command("code")
def approve_code(
    home: HomeOption = None, yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False
) -> None:
    """Approve the client code installed here, after showing which files changed since the last approval."""
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
        str, typer.Argument(help="Experiment file or recipe, or a digest, or the beginning of one that waits.")
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
    from client.policy.approval import pending
    from shared.experiment.config import load_experiment
    from shared.experiment.recipes import find_experiment, recipe_names
    from shared.messages.agreement.plan import resolve

    if Path(name).is_file() or name in recipe_names():
        return resolve(load_experiment(find_experiment(name), override))
    if override:
        raise InputError(f"--set goes with an experiment file or a recipe, {name[:70]!r} is none")
    waiting = [path for path in pending(place) if path.stem.startswith(name)]
    return load_experiment(waiting[0]) if len(waiting) == 1 else None


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


def check_installed(wanted: str) -> None:
    """Refuse to join a coordinator whose client code is another than what is installed here.

    Raises:
        InputError: naming both digests.
    """
    from shared.storage.code_digest import installed_digest

    digest = installed_digest()
    if digest != wanted:
        raise InputError(
            f"installed client code has digest {digest[:12]}, the coordinator's is {wanted[:12]}: "
            "install the same version"
        )


def approve_installed(place: Home) -> None:
    """Approve the client code installed here, and keep what its files are for the next comparison."""
    from client.policy.approval import approve
    from client.private_files import write_private
    from client.records.journal import Journal
    from shared.storage.code_digest import installed_digest

    digest = installed_digest()
    approve(place, "code", digest)
    write_private(place.path / APPROVED_FILES, json.dumps(file_digests()).encode())
    Journal(place.journal).write("approval", what="code", digest=digest)


def changed_files(place: Home) -> list[str]:
    """One line per file that differs from the code approved last."""
    path = place.path / APPROVED_FILES
    before: dict[str, str] = json.loads(path.read_bytes()) if path.exists() else {}
    now = file_digests()
    marks: list[tuple[Literal["added", "changed", "removed"], set[str]]] = [
        ("added", now.keys() - before.keys()),
        ("changed", {name for name in now.keys() & before.keys() if now[name] != before[name]}),
        ("removed", before.keys() - now.keys()),
    ]
    return [f"{mark} {name}" for mark, names in marks for name in sorted(names)] or ["no file has changed"]


def file_digests() -> dict[str, str]:
    """SHA-256 of each installed file of client code."""
    import hashlib

    import shared
    from shared.storage.code_digest import site_files

    files = site_files(Path(shared.__file__).resolve().parent.parent)
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
