"""One folder of images as the private folders of many sites: divided by person, or skewed by class (Dirichlet)."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np

from shared.data.images import ImageSource, list_images
from shared.data.synthetic import write_folder
from shared.errors import InputError
from shared.seeding import derive_seed

Skew = Literal["person", "dirichlet"]
REFERENCE_RATIO = 0.1
SYNTHETIC_PREFIX = "synthetic:"
_MOST_DIGITS = 10


@dataclass(frozen=True)
class Division:
    """Where the parts went: one folder per site, and the evaluator's held-out persons."""

    sites: list[Path]
    reference: Path
    unit: str
    """`person` when class folders name persons, else `image`."""
    num_images: dict[str, int]


def make_site_folders(source: str, out: Path, num_sites: int, size: int, skew: Skew, alpha: float, seed: int) -> None:
    """Fill `out`/site-0 to `out`/site-<num_sites - 1>; every site gets at least one image.

    Args:
        source: folder or zip of images, or `synthetic:<images per site>`, where each site is a population of its own.
        out: new folder.
        num_sites: virtual sites.
        size: side of synthetic images, in pixels.
        skew: `person`: whole persons, a tenth of them held out; `dirichlet`: see `divide_by_class`.
        alpha: concentration; small: each class at few sites; large: alike everywhere.
        seed: of the division.

    Raises:
        InputError: no images, too few for the sites, or no classes to skew by.
    """
    if source.startswith(SYNTHETIC_PREFIX):
        count = source.removeprefix(SYNTHETIC_PREFIX)
        if not (count.isascii() and count.isdecimal() and len(count) < _MOST_DIGITS) or not int(count):
            raise InputError(f"data {source}: give synthetic:<images per site>, such as synthetic:40")
        for index in range(num_sites):
            write_folder(out / f"site-{index}", int(count), size, seed, site=f"site{index}")
    elif skew == "person":
        divide_by_person(Path(source), out, num_sites, REFERENCE_RATIO, seed)
    else:
        divide_by_class(Path(source), out, num_sites, alpha, seed)


def divide_by_person(source: Path, out: Path, num_sites: int, reference_ratio: float, seed: int) -> Division:
    """Copy images into `out`/site-0, ... and `out`/reference, whole persons at a time.

    A person's place depends on seed and name only. Without class folders every image counts as a person of its own.

    Args:
        source: folder or zip; class folders are persons.
        out: new folder.
        num_sites: number of sites, at least 1.
        reference_ratio: share of the persons that no site gets, in (0, 1).
        seed: of the division.

    Raises:
        InputError: no images, `out` in use, or fewer persons than places.
    """
    if out.exists() and any(out.iterdir()):
        raise InputError(f"folder {out} is not empty: name a new one")
    images = list_images(source)
    order = sorted(set(images.owners), key=lambda name: hashlib.sha256(f"divide {seed} {name}".encode()).digest())
    num_reference = max(1, round(reference_ratio * len(order)))
    if len(order) - num_reference < num_sites:
        raise InputError(f"images {source}: {len(order)} persons cannot be divided among {num_sites} sites: give more")
    place = dict.fromkeys(order[:num_reference], "reference")
    place |= {name: f"site-{index % num_sites}" for index, name in enumerate(order[num_reference:])}
    return Division(
        sites=[out / f"site-{number}" for number in range(num_sites)],
        reference=out / "reference",
        unit="person" if images.persons else "image",
        num_images=copy_images(images, [place[owner] for owner in images.owners], out),
    )


def divide_by_class(source: Path, out: Path, num_sites: int, alpha: float, seed: int) -> None:
    """Share each class folder out in proportions from a symmetric Dirichlet distribution (arXiv 1909.06335).

    Args:
        source: folder or zip with class folders.
        out: new folder; images go to `out`/site-<number>.
        num_sites: number of sites, at most the number of images.
        alpha: concentration; small: each class at few sites; large: alike everywhere.
        seed: of the division.

    Raises:
        InputError: no class folders, or fewer images than sites.
    """
    images = list_images(source)
    if not images.persons:
        raise InputError(f"images {source} have no class folders to skew by: use --by person")
    if len(images.names) < num_sites:
        raise InputError(f"images {source}: {len(images.names)} images for {num_sites} sites: give more")
    random = np.random.default_rng(derive_seed(seed, "dirichlet", num_sites))
    labels = np.array(images.persons)
    site = np.empty(len(labels), np.int64)
    for label in sorted(set(images.persons)):
        members = random.permutation(np.flatnonzero(labels == label))
        shares = random.dirichlet(np.full(num_sites, alpha))
        site[members] = np.searchsorted(np.cumsum(shares), (np.arange(len(members)) + 0.5) / len(members))
    site = np.minimum(site, num_sites - 1)
    _fill_empty(site, num_sites)
    copy_images(images, [f"site-{number}" for number in site], out)


def _fill_empty(site: np.ndarray, num_sites: int) -> None:
    """A site without images takes one from the site with most."""
    counts = np.bincount(site, minlength=num_sites)
    for empty in np.flatnonzero(counts == 0):
        richest = int(np.argmax(counts))
        site[np.flatnonzero(site == richest)[0]] = empty
        counts[richest] -= 1
        counts[empty] += 1


def copy_images(images: ImageSource, places: Sequence[str | None], out: Path) -> dict[str, int]:
    """Copy each image into `out`/<its place>, in a folder per owner; images without a place are left out.

    Returns:
        Images of each place.
    """
    for number, (name, owner, place) in enumerate(zip(images.names, images.owners, places, strict=True)):
        if place is None:
            continue
        # Names inside a zip are not trusted with a path: folders are digests of the person, files are numbered.
        folder = out / place / hashlib.sha256(owner.encode()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:08d}{PurePosixPath(name).suffix.lower()}").write_bytes(images.read(name))
    return dict(Counter(place for place in places if place is not None))
