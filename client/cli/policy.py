"""The policy in words, and its commands: what it says, and bringing a `site.toml` of an older version up to date."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from client.home import find_home
from client.private_files import check_private, write_private
from shared.commandline import JsonOption, owned, tell_json

if TYPE_CHECKING:
    from client.settings import SitePolicy

HomeOption = Annotated[
    Path | None,
    typer.Option(
        "--home", envvar="MASKFED_CLIENT_HOME", callback=owned("site"), help="The site's folder; default: ./site."
    ),
]
policy = typer.Typer(no_args_is_help=True, help="What this site agrees to.")


def register(app: typer.Typer) -> None:
    """Add the command group to the program."""
    app.add_typer(policy, name="policy")


@policy.command("show")
def policy_show(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Say the policy in words."""
    from client.policy.approval import read_approved
    from client.settings import load_settings

    place = find_home(home)
    policy = load_settings(place).policy
    if as_json:
        tell_json(policy.model_dump(mode="json"))
    else:
        typer.echo(describe(policy, read_approved(place).refused))


@policy.command("migrate")
def policy_migrate(
    home: HomeOption = None, yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False
) -> None:
    """Bring `site.toml` of an older version up to date, after showing every difference; the old file is kept."""
    from client.policy.migration import differences, migrated
    from client.settings import read_toml

    place = find_home(home)
    check_private(place.settings)
    old = place.settings.read_text(encoding="utf-8")
    settings, notes = migrated(read_toml(place.settings), str(place.settings))
    new, lines = differences(old, settings)
    if not lines:
        typer.echo(f"{place.settings} is up to date")
        return
    for line in [*lines, *notes]:
        typer.echo(line)
    if not yes:
        typer.confirm(f"write these changes to {place.settings}?", abort=True)
    kept = place.settings.with_suffix(".toml.old")
    write_private(kept, old.encode())
    write_private(place.settings, new.encode())
    typer.echo(f"written; the old file is {kept}")


def describe(policy: "SitePolicy", refused: frozenset[str] = frozenset()) -> str:
    """The policy in one sentence per rule; `refused` are the experiments that the operator has refused."""
    from client.policy.rules import is_any_allowed

    private = (
        f"training with DP only, at most epsilon {policy.epsilon_cap:g} at delta {policy.delta:g} per {policy.unit}"
        if policy.require_dp
        else "TRAINING WITHOUT DP IS ALLOWED: images can be reconstructed from such updates, and the ledger then says "
        f"`unbounded`; DP rounds up to epsilon {policy.epsilon_cap:g} at delta {policy.delta:g} per {policy.unit}"
    )
    asks = "any experiment within this" if is_any_allowed(policy, refused) else "each experiment needs your approval"
    audit = policy.audit
    audits = (
        f"; at most {audit.max_per_run} audits of a run's models, each charged like one step of noise "
        f"{audit.noise_multiplier:g} on all data"
        if "audit" in policy.tasks
        else ""
    )
    return (
        f"tasks {', '.join(policy.tasks) or 'none'}; {private}; noise multiplier from {policy.min_noise_multiplier:g}; "
        f"at most {policy.max_steps_per_round} steps per round and {policy.max_rounds_per_day} rounds per day; {asks}"
        f"{audits}{'; updates leave masked only' if policy.secure.require else ''}"
    )
