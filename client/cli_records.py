"""The commands that show and decide: ledger, journal, approvals. Registered by `cli.py`."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from client.settings import Home, find_home, load_settings
from shared.errors import InputError

HomeOption = Annotated[Path | None, typer.Option("--home", help="The site's folder; default: MASKFED_CLIENT_HOME.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable.")]
ledger = typer.Typer(no_args_is_help=True, help="What the images have been charged with.")
journal = typer.Typer(no_args_is_help=True, help="What was asked, decided and released.")
approvals = typer.Typer(no_args_is_help=True, help="Code and experiments that may run here.")
APPROVED_FILES = "approved-files.json"


def register(app: typer.Typer) -> None:
    """Add the command groups to the program."""
    app.add_typer(ledger, name="ledger")
    app.add_typer(journal, name="journal")
    app.add_typer(approvals, name="approve")


@ledger.command("show")
def ledger_show(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """List every charge, and the total of each data set with its unit and delta."""
    from client.app import epsilon_of
    from client.ledger import read_ledger

    place = find_home(home)
    settings, history = load_settings(place), read_ledger(place.ledger)
    charges, committed = history.charges, history.committed
    ids = list(dict.fromkeys(charge.dataset_id for _, charge in charges))
    totals = {each: history.total(each, settings.policy.delta, epsilon_of) for each in ids}
    if as_json:
        rows = [{"sequence": e.sequence, "time": e.time.isoformat(), **c.model_dump()} for e, c in charges]
        summed = {each: {**vars(total), "cap": settings.policy.epsilon_cap} for each, total in totals.items()}
        typer.echo(json.dumps({"charges": rows, "committed": sorted(committed), "totals": summed}))
        return
    for entry, charge in charges:
        state = "" if entry.sequence in committed else "  NOT COMPLETED, counts as spent"
        cost = (
            "without DP"
            if charge.mechanism == "none"
            else f"sigma {charge.noise_multiplier:g}, q {charge.sample_rate:g}, {charge.steps} steps, per {charge.unit}"
        )
        note = f" ({charge.remarks})" if charge.remarks else ""
        what = f"{charge.task} {charge.run} round {charge.server_round}"
        typer.echo(f"{entry.sequence:6d} {entry.time:%Y-%m-%d %H:%M} {what}: {cost}{note}{state}")
    for each, total in totals.items():
        typer.echo(f"data set {each}: {total}, cap {settings.policy.epsilon_cap:g}")
    if not charges:
        typer.echo("nothing has been charged yet")


@ledger.command("verify")
def ledger_verify(
    home: HomeOption = None,
    adopt: Annotated[bool, typer.Option("--adopt", help="Accept this copy as the newest; recorded for ever.")] = False,
) -> None:
    """Check every line's hash, their order, and that this is the newest copy."""
    from client.ledger import head_problem, open_ledger, read_ledger

    place = find_home(home)
    head_file = Path(load_settings(place).head_file)
    if adopt:
        with open_ledger(place.ledger, head_file, adopt=True):
            pass
    history = read_ledger(place.ledger)
    if problem := head_problem(history, head_file):
        raise InputError(problem)
    newest = f", newest {history.entries[-1].hash}" if history.entries else ""
    typer.echo(f"{place.ledger}: {len(history.entries)} entries, unbroken{newest}")


@ledger.command("plan")
def ledger_plan(
    experiment: Annotated[Path, typer.Argument(help="Experiment file with a [privacy] section.")],
    home: HomeOption = None,
    override: Annotated[list[str] | None, typer.Option("--set", help="section.key=value")] = None,
) -> None:
    """Say how many rounds of an experiment fit under the cap, and which noise would fit all of them."""
    from client.dataset import current_id
    from client.ledger import read_ledger
    from client.planning import noise_that_fits, num_that_fit
    from client.privacy import epsilon
    from client.spending import Spending
    from shared.config import load_experiment

    place = find_home(home)
    policy, planned = load_settings(place).policy, load_experiment(experiment, override)
    if planned.privacy.mechanism == "none":
        raise InputError(
            f"{experiment}: privacy.mechanism is 'none': nothing to plan, it would make the total unbounded"
        )
    dataset_id = current_id(place)
    spent = read_ledger(place.ledger).spending(dataset_id) if dataset_id else []
    rounds, steps = planned.federation.rounds, planned.federation.local_steps
    sigma, rate = planned.privacy.noise_multiplier, planned.privacy.sample_rate
    now, after = epsilon(spent, policy.delta), epsilon([*spent, Spending(sigma, rate, rounds * steps)], policy.delta)
    fit = num_that_fit(spent, Spending(sigma, rate, steps), policy.delta, policy.epsilon_cap, rounds)
    typer.echo(f"spent epsilon {now:.3f} per {policy.unit} at delta {policy.delta:g}, cap {policy.epsilon_cap:g}")
    typer.echo(f"{rounds} rounds of {steps} steps at sigma {sigma:g}, q {rate:g}: epsilon {after:.3f}")
    typer.echo(f"rounds that fit under the cap: {fit} of {rounds}")
    noise = noise_that_fits(spent, rate, rounds * steps, policy.delta, policy.epsilon_cap)
    typer.echo(f"noise multiplier at which all {rounds} rounds fit: {noise:.4g}")


@journal.command("show")
def journal_show(
    home: HomeOption = None, last: Annotated[int, typer.Option(min=1, help="Newest entries to show.")] = 50
) -> None:
    """Print the newest requests, decisions and releases."""
    from client.journal import Journal
    from client.view import event_line

    for entry in Journal(find_home(home).journal).entries()[-last:]:
        typer.echo(event_line(entry))


@journal.command("verify")
def journal_verify(home: HomeOption = None) -> None:
    """Check every line's hash and their order."""
    from client.journal import Journal

    place = find_home(home)
    typer.echo(f"{place.journal}: {len(Journal(place.journal).entries())} entries, unbroken")


@approvals.command("list")
def approve_list(home: HomeOption = None) -> None:
    """Show what is approved and which experiments wait."""
    from client.approval import pending, read_approved
    from shared.codedigest import installed_digest

    place = find_home(home)
    approved = read_approved(place)
    for digest in sorted(approved.code):
        typer.echo(f"code {digest}{' (installed)' if digest == installed_digest() else ''}")
    if installed_digest() not in approved.code:
        typer.echo(f"installed code {installed_digest()} is NOT approved: `maskfed-client approve code`")
    for digest in sorted(approved.experiments):
        typer.echo(f"experiment {digest}")
    for path in pending(place):
        typer.echo(f"waiting: experiment {path.stem}, read it in {path}")


@approvals.command("code")
def approve_code(
    home: HomeOption = None, yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False
) -> None:
    """Approve the client code installed here, after showing which files changed since the last approval."""
    from shared.codedigest import installed_digest

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
    digest: Annotated[str, typer.Argument(help="Digest, or the beginning of one that waits.")],
    home: HomeOption = None,
) -> None:
    """Approve an experiment by its digest; read it first."""
    from client.approval import approve, pending
    from client.journal import Journal

    place = find_home(home)
    waiting = [path.stem for path in pending(place) if path.stem.startswith(digest)]
    chosen = waiting[0] if len(waiting) == 1 else digest
    approve(place, "experiment", chosen)
    Journal(place.journal).write("approval", what="experiment", digest=chosen)
    typer.echo(f"approved experiment {chosen}")


@approvals.command("revoke")
def approve_revoke(digest: Annotated[str, typer.Argument(help="Digest.")], home: HomeOption = None) -> None:
    """Take an approval back."""
    from client.approval import revoke
    from client.journal import Journal

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
    from shared.codedigest import installed_digest

    digest = installed_digest()
    if digest != wanted:
        raise InputError(
            f"installed client code has digest {digest[:12]}, the coordinator's is {wanted[:12]}: "
            "install the same version"
        )


def approve_installed(place: Home) -> None:
    """Approve the client code installed here, and keep what its files are for the next comparison."""
    from client.approval import approve
    from client.journal import Journal
    from client.settings import write_private
    from shared.codedigest import installed_digest

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
    from shared.codedigest import site_files

    files = site_files(Path(shared.__file__).resolve().parent.parent)
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
