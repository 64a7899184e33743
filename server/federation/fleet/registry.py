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
    """One site: alias, public keys of its node (OpenSSH text) and of its messages, Flower's node id once registered."""

    alias: str = Field(pattern=ALIAS_PATTERN)
    public_key: str = Field(min_length=1, max_length=2000)
    signing_key: str = Field("", pattern=r"^([0-9a-f]{64})?$")
    """Ed25519, hexadecimal; empty: enrolled before messages were signed, and not asked until it is renewed."""
    former_keys: tuple[str, ...] = ()
    """Public keys that this site had before; nobody gets them again."""
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

    def admitted(self) -> list[Site]:
        """Sites that the door lets in: all that were not revoked."""
        return [site for site in self.sites() if site.revoked is None]

    def active(self) -> list[Site]:
        """Sites that may take part now: admitted, and with a key that their answers can be checked with."""
        return [site for site in self.admitted() if site.signing_key]

    def get(self, alias: str) -> Site:
        """The admitted site `alias`.

        Raises:
            InputError: there is none.
        """
        sites = self.admitted()
        for site in sites:
            if site.alias == alias:
                return site
        known = ", ".join(site.alias for site in sites) or "none"
        raise InputError(f"site {alias!r} is not registered: registered are {known}")

    def check_new(self, requested: Sequence[tuple[str, str, str]]) -> None:
        """Refuse sites (alias, node key, signing key) that `add` would not all take up as new.

        Raises:
            InputError: an alias or a key is known already, or stands there twice.
        """
        aliases = {alias for alias, _, _ in requested}
        keys = {key for _, node, signing in requested for key in (_key_part(node), signing)}
        if len(aliases) < len(requested) or len(keys) < 2 * len(requested):
            raise InputError("two requests have the same alias or the same key: give each site once")
        for known in self.sites():
            if known.alias in aliases:
                raise InputError(
                    f"site {known.alias!r} is registered already, or was removed: `sites renew` takes a new key of a "
                    "registered site, a new site needs another alias"
                )
            if keys & _keys_of(known):
                raise InputError(f"this key belongs to site {known.alias!r}: each site makes its own key")

    def add(self, alias: str, public_key: str, signing_key: str) -> Site:
        """Add a site; adding the same alias with the same keys again changes nothing.

        Raises:
            InputError: the alias is malformed or taken, or a key belongs to another site.
        """
        try:
            site = Site(alias=alias, public_key=_key_part(public_key), signing_key=signing_key, added=_now())
        except ValidationError as error:
            raise InputError(f"site: {explain(error)}; an alias is lower case letters, digits and hyphens") from error
        with self._changing() as sites:
            for known in sites:
                if known.alias == alias and known.revoked is None and _keys_now(known) == _keys_now(site):
                    return known
                if known.alias == alias:
                    raise InputError(f"alias {alias!r} is taken by another key or was revoked: choose another alias")
                if _keys_of(site) & _keys_of(known):
                    raise InputError(f"this key belongs to site {known.alias!r}: each site makes its own key")
            sites.append(site)
        return site

    def renew(self, alias: str, public_key: str, signing_key: str) -> str:
        """Give a registered site a new key; the one that stays vouches for it.

        Returns:
            Which key is new: `node key` or `signing key`.

        Raises:
            InputError: both keys are new or none is, or the new one was in use before, here or elsewhere.
        """
        site, given = self.get(alias), (_key_part(public_key), signing_key)
        changed = [new != old for new, old in zip(given, _keys_now(site), strict=True)]
        if sum(changed) != 1:
            problem = "both keys are new" if all(changed) else "neither key is new"
            cure = "if both are lost, remove the site and let it enrol under another alias"
            raise InputError(f"site {alias!r}: {problem}, but one must vouch for the other; {cure}")
        number = changed.index(True)
        old = tuple(filter(None, [_keys_now(site)[number]]))
        update = {"public_key": given[0], "signing_key": given[1], "former_keys": (*site.former_keys, *old)}
        with self._changing() as sites:
            if any(given[number] in _keys_of(known) for known in sites):
                raise InputError(f"site {alias!r}: this key was in use before: the site makes another one")
            # Flower's address belongs to a node key.
            _replace(sites, site.model_copy(update={**update, "node_id": site.node_id if number else None}))
        return ("node key", "signing key")[number]

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


def _key_part(public_key: str) -> str:
    """An OpenSSH line without its comment."""
    return " ".join(public_key.split()[:2])


def _keys_now(site: Site) -> tuple[str, str]:
    return site.public_key, site.signing_key


def _keys_of(site: Site) -> set[str]:
    """All keys that ever were this site's."""
    return {*_keys_now(site), *site.former_keys} - {""}


def _replace(sites: list[Site], changed: Site) -> None:
    sites[[site.alias for site in sites].index(changed.alias)] = changed


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
