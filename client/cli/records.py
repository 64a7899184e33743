"""What is shown elsewhere: journal, evidence, alerts, and the figures of a running site."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from client.home import Home, find_home
from shared.commandline import JsonOption, owned, tell_json

if TYPE_CHECKING:
    from client.settings import SiteConfig

HomeOption = Annotated[
    Path | None,
    typer.Option(
        "--home", envvar="MASKFED_CLIENT_HOME", callback=owned("site"), help="The site's folder; default: ./site."
    ),
]
journal = typer.Typer(no_args_is_help=True, help="See what was asked, decided and released.")


def register(app: typer.Typer) -> None:
    """Add the command groups to the program."""
    app.add_typer(journal, name="journal")
    app.command()(evidence)
    app.command()(alerts)


@journal.command("show")
def journal_show(
    home: HomeOption = None,
    last: Annotated[int, typer.Option(min=1, help="How many of the newest entries to show.")] = 50,
    as_json: JsonOption = False,
) -> None:
    """Print the newest requests, decisions and releases."""
    from client.operator.status import entry_facts, event_line
    from client.records.journal import Journal

    entries = Journal(find_home(home).journal).entries()[-last:]
    if as_json:
        tell_json(list(map(entry_facts, entries)))
        return
    for entry in entries:
        typer.echo(event_line(entry))


@journal.command("verify")
def journal_verify(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Check that no line was changed or lost."""
    from client.records.journal import Journal

    place = find_home(home)
    number = len(Journal(place.journal).entries())
    if as_json:
        tell_json({"file": str(place.journal), "num_entries": number})
    else:
        typer.echo(f"{place.journal}: {number} entries, unbroken")


def evidence(
    run: Annotated[str, typer.Argument(help="Name of a run that this site was asked for.")],
    out: Annotated[Path, typer.Option(help="New file to write, such as RUN.zip.")],
    home: HomeOption = None,
    record: Annotated[
        Path | None, typer.Option(help="Also write the page for the data-protection officer to this new HTML file.")
    ] = None,
) -> None:
    """Write what this site was asked, did and spent for a run, signed, for whoever has to check it elsewhere."""
    from client.operator.evidence import write_evidence
    from client.privacy.epsilon import epsilon_of
    from client.settings import load_settings

    place = find_home(home)
    key = write_evidence(place, load_settings(place), run, out, epsilon_of, record)
    typer.echo(f"{out}: check it elsewhere with `maskfed-server verify {out.name} --key {key}`")


def alerts(
    home: HomeOption = None,
    to: Annotated[str, typer.Option(help="Send alerts to this https:// address; -: read it from standard input.")] = "",
    proxy: Annotated[
        str, typer.Option(help="HTTP proxy on the way there, http://host:port; default: that of site.toml.")
    ] = "",
    off: Annotated[bool, typer.Option("--off", help="Send none from now on.")] = False,
    test: Annotated[bool, typer.Option("--test", help="Send a test message and wait for the answer.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Send what needs you to a webhook: requests refused, 80 % of the cap spent, certificates that end. No number."""
    from client.settings import load_settings
    from deploy.alerts.setup import change_alerts, in_words

    place = find_home(home)
    settings = load_settings(place)
    way = proxy or (settings.proxy if to else "")
    facts = change_alerts(place.path, f"site {settings.alias}", to, way, off=off, test=test)
    if as_json:
        tell_json(facts)
    else:
        typer.echo(in_words(facts))


def figures(place: Home, settings: "SiteConfig", port: int) -> contextlib.AbstractContextManager[object]:
    """The Prometheus endpoint, if one is wanted."""
    from client.operator.metrics import site_gauges
    from deploy.observe.prometheus import serve
    from deploy.processes.process import check_port_free

    if not port:
        return contextlib.nullcontext()
    check_port_free("127.0.0.1", port, "metrics")
    return serve(port, lambda: site_gauges(place, settings))


def watch_for_alerts(place: Home, alias: str) -> contextlib.AbstractContextManager[None]:
    """What is told to a webhook, if there is one, while the block runs."""
    from client.operator.alerts import SiteAlerts
    from deploy.alerts.expiry import SITES, certificates_left, ending
    from deploy.alerts.notifier import notifying

    def certificates(_since: float) -> Iterator[tuple[str, str, str]]:
        return ending(certificates_left(place.path, SITES))

    return notifying(place.path, f"site {alias}", [SiteAlerts(place), certificates])
