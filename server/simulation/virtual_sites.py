"""One folder of images as the private folders of many virtual sites: by person, or skewed by class (Dirichlet)."""

import hashlib
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np

from server.simulation.by_person import divide
from shared.data.images import list_images
from shared.data.synthetic import write_folder
from shared.errors import InputError
from shared.seeding import derive_seed

Skew = Literal["person", "dirichlet"]
REFERENCE_RATIO = 0.1
SYNTHETIC_PREFIX = "synthetic:"


def partition(source: str, out: Path, num_sites: int, size: int, skew: Skew, alpha: float, seed: int) -> None:
    """Fill `out`/site-0 to `out`/site-<num_sites - 1>; every site gets at least one image.

    Args:
        source: folder or zip of images, or `synthetic:<images per site>`, where each site is a population of its own.
        out: new folder.
        num_sites: virtual sites.
        size: side of synthetic images, in pixels.
        skew: `person`: whole persons, a tenth of them held out; `dirichlet`: each class folder is shared out in
            proportions drawn from a symmetric Dirichlet distribution (Hsu et al. 2019, arXiv 1909.06335).
        alpha: concentration; small: each class at few sites; large: alike everywhere.
        seed: of the division.

    Raises:
        InputError: no images, too few for the sites, or no classes to skew by.
    """
    if source.startswith(SYNTHETIC_PREFIX):
        count = source.removeprefix(SYNTHETIC_PREFIX)
        if not count.isdigit() or not int(count):
            raise InputError(f"data {source}: give synthetic:<images per site>, such as synthetic:40")
        for index in range(num_sites):
            write_folder(out / f"site-{index}", int(count), size, seed, site=f"site{index}")
    elif skew == "person":
        divide(Path(source), out, num_sites, REFERENCE_RATIO, seed)
    else:
        _dirichlet(Path(source), out, num_sites, alpha, seed)


def _dirichlet(source: Path, out: Path, num_sites: int, alpha: float, seed: int) -> None:
    images = list_images(source)
    if not images.persons:
        raise InputError(f"images {source} have no class folders to skew by: use --by person")
    if len(images.names) < num_sites:
        raise InputError(f"images {source}: {len(images.names)} images for {num_sites} sites: give more")
    random = np.random.default_rng(derive_seed(seed, "dirichlet", num_sites))
    classes = sorted(set(images.persons))
    numbers = {label: [k for k, owner in enumerate(images.persons) if owner == label] for label in classes}
    place = np.empty(len(images.names), np.int64)
    for label in classes:
        members = random.permutation(numbers[label])
        shares = random.dirichlet(np.full(num_sites, alpha))
        place[members] = np.searchsorted(np.cumsum(shares), (np.arange(len(members)) + 0.5) / len(members))
    place = np.minimum(place, num_sites - 1)
    _fill_empty(place, num_sites)
    for number, name in enumerate(images.names):
        folder = out / f"site-{place[number]}" / hashlib.sha256(images.persons[number].encode()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:08d}{PurePosixPath(name).suffix.lower()}").write_bytes(images.read(name))


def _fill_empty(place: np.ndarray, num_sites: int) -> None:
    """A site without images takes one from the site with most."""
    counts = np.bincount(place, minlength=num_sites)
    for site in np.flatnonzero(counts == 0):
        richest = int(np.argmax(counts))
        place[np.flatnonzero(place == richest)[0]] = site
        counts[richest] -= 1
        counts[site] += 1
