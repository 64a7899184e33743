"""Whose picture each file of a site is, and what the operator has confirmed of it. No torch."""

import hashlib
from pathlib import Path

from client.home import Home
from client.private_files import write_private
from client.settings import SiteConfig
from shared.data.identity_file import read_identities
from shared.data.images import ImageSource
from shared.data.persons import folder_levels, persons_by_folder
from shared.errors import InputError
from shared.storage.files import canonical_json


def persons_of(source: ImageSource, settings: SiteConfig) -> tuple[str, ...] | None:
    """Person of each file: by `identities`, else its folder; None where images lie beside the folders.

    Raises:
        InputError: folders are nested and nothing says which of them is the person, or identities are not clear.
    """
    if settings.identities:
        return read_identities(Path(settings.identities), source.names)
    levels = folder_levels(source.names)
    if settings.person_depth:
        persons = persons_by_folder(source.names, settings.person_depth)
        if persons is None:
            raise InputError(
                f"person_depth {settings.person_depth}, but {source.path} has images with fewer folders above them: "
                "give another depth, or identities"
            )
        return persons
    if source.persons is not None and levels > 1:
        deepest = max(source.names, key=lambda name: name.count("/"))
        raise InputError(
            f"images {source.path} lie {levels} folders deep, as {deepest}: which folder is the person? give "
            "`--identities`, or `--person-depth 1` for the first (`person_depth` in site.toml), 2 for the second"
        )
    return source.persons


def is_confirmed(home: Home, source: ImageSource, persons: tuple[str, ...]) -> bool:
    """Whether the operator has confirmed exactly these persons before."""
    path = home.confirmed_persons
    return path.exists() and path.read_text(encoding="ascii", errors="replace").strip() == _digest(source, persons)


def keep_confirmed(home: Home, source: ImageSource, persons: tuple[str, ...]) -> None:
    """Remember what the operator has confirmed."""
    write_private(home.confirmed_persons, _digest(source, persons).encode())


def _digest(source: ImageSource, persons: tuple[str, ...]) -> str:
    return hashlib.sha256(canonical_json([list(each) for each in zip(source.names, persons, strict=True)])).hexdigest()
