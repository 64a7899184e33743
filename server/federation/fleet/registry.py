"""The sites that may take part: `sites.json` in the coordinator's home.

A site is known by its alias, for ever: streams, selection and records are keyed by it. Flower's node id is only an
address, and changes whenever the SuperLink's state is lost.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from pydantic import Field, ValidationError

from shared.errors import InputError
from shared.experiment.config import Section, explain

ALIAS_PATTERN = r"^[a-z0-9][a-z0-9-]{0,31}$"


class Site(Section):
    """One site: alias, public key of its node (OpenSSH text), Flower's node id once registered."""

    alias: str = Field(pattern=ALIAS_PATTERN)
    public_key: str = Field(min_length=1, max_length=2000)
    node_id: int | None = None
    added: str
    """ISO 8601, UTC."""
    revoked: str | None = None
    """ISO 8601, UTC; a revoked alias is never given to another key, so that records stay unambiguous."""


def check_home(home: Path) -> None:
    """Refuse a folder that is no coordinator's.

    Raises:
        InputError: it has no settings.
    """
    if not (home / "coordinator.toml").is_file():
        raise InputError(f"{home / 'coordinator.toml'}: no such file; run `maskfed-server init` or give --home")


class Registry:
    """The file `sites.json`; every change is one locked read, check and atomic write."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def sites(self) -> list[Site]:
        """All sites ever added, revoked ones included, by alias.

        Raises:
            InputError: the file is damaged.
        """
        try:
            entries = json.loads(self.path.read_text(encoding="utf-8"))["sites"]
            return [Site.model_validate(entry) for entry in entries]
        except FileNotFoundError:
            return []
        except ValidationError as error:
            raise InputError(f"site registry {self.path}: {explain(error)}; restore the file") from error
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"site registry {self.path} is damaged ({error}): restore it from a backup") from error

    def active(self) -> list[Site]:
        """Sites that may take part now."""
        return [site for site in self.sites() if site.revoked is None]

    def get(self, alias: str) -> Site:
        """The active site `alias`.

        Raises:
            InputError: there is none.
        """
        for site in self.active():
            if site.alias == alias:
                return site
        known = ", ".join(site.alias for site in self.active()) or "none"
        raise InputError(f"site {alias!r} is not registered: registered are {known}")

    def check_new(self, requested: Sequence[tuple[str, str]]) -> None:
        """Refuse sites (alias, public key) that `add` would not all take up as new.

        Raises:
            InputError: an alias or a key is known already, or stands there twice.
        """
        keys = {" ".join(key.split()[:2]): alias for alias, key in requested}
        if len(keys) < len(requested) or len(set(keys.values())) < len(requested):
            raise InputError("two requests have the same alias or the same key: give each site once")
        for known in self.sites():
            if known.alias in keys.values():
                raise InputError(f"site {known.alias!r} is registered already, or was removed: choose another alias")
            if known.public_key in keys:
                raise InputError(f"this key belongs to site {known.alias!r}: each site makes its own key")

    def add(self, alias: str, public_key: str) -> Site:
        """Add a site; adding the same alias with the same key again changes nothing.

        Raises:
            InputError: the alias is malformed or taken, or the key belongs to another site.
        """
        key = " ".join(public_key.split()[:2])
        try:
            site = Site(alias=alias, public_key=key, added=_now())
        except ValidationError as error:
            raise InputError(f"site: {explain(error)}; an alias is lower case letters, digits and hyphens") from error
        with self._changing() as sites:
            for known in sites:
                if known.alias == alias and known.public_key == key and known.revoked is None:
                    return known
                if known.alias == alias:
                    raise InputError(f"alias {alias!r} is taken by another key or was revoked: choose another alias")
                if known.public_key == key:
                    raise InputError(f"this key belongs to site {known.alias!r}: each site makes its own key")
            sites.append(site)
        return site

    def revoke(self, alias: str) -> Site:
        """Revoke a site; returns it as it was, node id included."""
        site = self.get(alias)
        with self._changing() as sites:
            _replace(sites, site.model_copy(update={"revoked": _now(), "node_id": None}))
        return site

    def set_node_id(self, alias: str, node_id: int) -> None:
        """Record the address that Flower gave to a site."""
        site = self.get(alias)
        if site.node_id != node_id:
            with self._changing() as sites:
                _replace(sites, site.model_copy(update={"node_id": node_id}))

    @contextlib.contextmanager
    def _changing(self) -> Iterator[list[Site]]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_name(self.path.name + ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            sites = self.sites()
            yield sites
            sites.sort(key=lambda site: site.alias)
            write_json(self.path, {"sites": [site.model_dump(mode="json") for site in sites]})


def write_json(path: Path, value: object) -> None:
    """Write JSON so that a reader, or a crash, sees the old file or the new one, never a part."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _replace(sites: list[Site], changed: Site) -> None:
    sites[[site.alias for site in sites].index(changed.alias)] = changed


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
