"""The question that `join` and `data scan` ask: are these the persons?"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from client.home import Home
from shared.errors import InputError

if TYPE_CHECKING:
    from client.settings import SiteConfig

PersonsOption = Annotated[
    int | None,
    typer.Option("--persons", min=1, help="How many persons there are; if that is so, no question is asked."),
]


def confirm_persons(home: Home, settings: "SiteConfig", expected: int | None) -> tuple[str, ...] | None:
    """Show who is on the images; with the person as the unit of privacy, go on only when somebody confirms it.

    Returns:
        Person of each file, or None where the images are not sorted by person.

    Raises:
        InputError: not confirmed, another number than expected, or nobody there to ask.
    """
    from client.data.person_mapping import is_confirmed, persons_of
    from shared.data.images import list_images
    from shared.data.persons import doubts, summary

    source = list_images(Path(settings.data))
    persons = persons_of(source, settings)
    if persons is None:
        if expected is not None:
            raise InputError(f"--persons {expected}, but the images in {settings.data} are not sorted by person")
        return None
    number = len(set(persons))
    typer.echo(summary(persons))
    for doubt in doubts(persons):
        typer.echo(f"WARNING: {doubt}")
    if expected is not None and expected != number:
        raise InputError(f"--persons {expected}, but these are {number}: look at the folders or `identities`")
    if expected is None and settings.policy.unit == "person" and not is_confirmed(home, source, persons):
        _ask(number)
    return persons


def keep_persons(home: Home, settings: "SiteConfig") -> None:
    """Remember that these persons were confirmed: the next scan of the same files does not ask."""
    from client.data.person_mapping import keep_confirmed, persons_of
    from shared.data.images import list_images

    source = list_images(Path(settings.data))
    if persons := persons_of(source, settings):
        keep_confirmed(home, source, persons)


def warn_of_audits(settings: "SiteConfig", persons: tuple[str, ...] | None) -> None:
    """Say at once when the share that is held out will be too small for audits.

    Args:
        settings: name images, held-out share and policy.
        persons: person of each file, or None.
    """
    from client.answers.audit_power import foreseen
    from shared.data.images import list_images

    policy = settings.policy
    files = list_images(Path(settings.data)).names if persons is None else persons
    units = len(set(files)) if policy.unit == "person" else len(files)
    if "audit" in policy.tasks and (problem := foreseen(units, settings.held_out_ratio, policy.unit, policy.audit)):
        typer.echo(f"WARNING: {problem}")


def _ask(number: int) -> None:
    if not sys.stdin.isatty():
        raise InputError(f"nobody is here to confirm that these are persons: add `--persons {number}` if they are")
    if not typer.confirm("Epsilon will protect each of these as one person. Is that right?"):
        raise InputError("not confirmed: give one folder per person, `--identities` or another `--person-depth`")


def with_unit(home: Home, settings: "SiteConfig", unit: str | None, num_persons: int | None) -> "SiteConfig":
    """The settings with the unit of privacy that is asked for, or the person where images are sorted by person.

    Raises:
        InputError: no images, or persons that are missing, not clear or not confirmed; nothing was written.
    """
    from client.data.dataset import CURE_PERSONS
    from client.data.person_mapping import persons_of
    from shared.data.images import list_images

    if unit is None and persons_of(list_images(Path(settings.data)), settings) is not None:
        settings = settings.model_copy(update={"policy": settings.policy.model_copy(update={"unit": "person"})})
    persons = confirm_persons(home, settings, num_persons)
    if settings.policy.unit == "person" and persons is None:
        raise InputError(f"--unit person, but {settings.data} is not sorted by person. {CURE_PERSONS}")
    warn_of_audits(settings, persons)
    return settings
