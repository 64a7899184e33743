"""The commands that show what was: journal, evidence."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from client.settings import find_home
from shared.commandline import JsonOption, owned, tell_json

if TYPE_CHECKING:
    pass

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
