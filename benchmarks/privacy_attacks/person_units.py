"""Attacks on the person as the unit of privacy: one person's images end up in several units, or in another one's.

A success changes what epsilon protects without a word to anybody.
"""

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from unittest import mock

import numpy as np

from benchmarks.privacy_attacks.outcome import Outcome
from benchmarks.privacy_attacks.tiny_sites import SIZE, Site, draw, file_away, repeat
from client.data import dataset, held_out, scan
from client.data.held_out import Split, first_of_each
from client.settings import SiteConfig
from shared.data.images import ImageSource
from shared.errors import InputError


def albums(root: Path, random: np.random.Generator, is_guarded: bool) -> bool:
    """Two people with several albums each: more units than people."""
    names = [f"{who}/{year}/{n}.ppm" for who in ("ann", "bob") for year in (2019, 2020, 2021) for n in range(2)]
    photos = file_away(root / "photos", dict(zip(names, draw(random, len(names)), strict=True)))
    site = Site.make(root / "site", photos)
    with contextlib.ExitStack() as guard_off:
        if not is_guarded:
            guard_off.enter_context(mock.patch.object(scan, "persons_of", _whole_path))
        try:
            dataset.scan(site.home, site.settings)
        except InputError:
            return False
    return len(dataset.open_dataset(site.home, SIZE).units("person")) > 2  # two people


def group_photographs(root: Path, random: np.random.Generator, is_guarded: bool) -> bool:
    """One person is removed, whose pictures others hold, too: units of others change."""
    pictures = draw(random, 11)
    others = {f"p{who}/own{n}.ppm": pictures[2 * who + n] for who in range(1, 4) for n in range(2)}
    others |= {f"p{who}/group.ppm": pictures[7 + who] for who in range(1, 4)}
    first = {f"p0/own{n}.ppm": pictures[n] for n in range(2)} | {
        f"p0/{who}.ppm": pictures[7 + who] for who in range(1, 4)
    }
    with contextlib.ExitStack() as guard_off:
        if not is_guarded:
            by_owner = held_out._by_owner
            drop = mock.patch.object(held_out, "_by_owner", lambda each: by_owner(first_of_each(each)))
            guard_off.enter_context(drop)
        units = []
        for name, filed in (("with", {**first, **others}), ("without", others)):
            site = Site.make(root / name, file_away(root / f"{name}-photos", filed))
            dataset.scan(site.home, site.settings)
            units.append(_units(site))
    return any(units[0].get(person) != unit for person, unit in units[1].items())


def relabelled_persons(root: Path, random: np.random.Generator, is_guarded: bool) -> bool:
    """Between two rounds each image becomes a person of its own, in the same data set."""
    names = [f"{n}.ppm" for n in range(8)]
    photos = file_away(root / "photos", dict(zip(names, draw(random, len(names)), strict=True)))
    identities = root / "identities.txt"
    identities.write_text("\n".join(f"{name} p{n // 4}" for n, name in enumerate(names)))
    site = Site.make(root / "site", photos, identities=str(identities))
    before = dataset.scan(site.home, site.settings).dataset_id
    site.spend()
    identities.write_text("\n".join(f"{name} q{n}" for n, name in enumerate(names)))
    with contextlib.ExitStack() as guard_off:
        if not is_guarded:
            guard_off.enter_context(mock.patch.object(Split, "is_regrouped", return_value=False))
        after = dataset.scan(site.home, site.settings).dataset_id
    return before == after or site.spent() == 0


def _units(site: Site) -> dict[str, set[bytes]]:
    data = dataset.open_dataset(site.home, SIZE)
    return {
        str(PurePosixPath(data.images.names[unit[0]]).parent): {data.images.images[row].tobytes() for row in unit}
        for unit in data.units("person")
    }


def _whole_path(source: ImageSource, settings: SiteConfig) -> tuple[str, ...]:
    """Persons as folders of any depth, as they once were."""
    return tuple(str(PurePosixPath(name).parent) for name in source.names)


ATTACKS: dict[str, Callable[[int, bool, int], Outcome]] = {
    name: functools.partial(repeat, name, trial)
    for name, trial in (
        ("albums as persons", albums),
        ("group photographs", group_photographs),
        ("relabelled persons", relabelled_persons),
    )
}
