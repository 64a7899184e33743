"""Divide one set of private images among sites and an evaluator, so that no person is in two places."""

import hashlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from shared.data.images import ImageSource, list_images
from shared.errors import InputError


@dataclass(frozen=True)
class Division:
    """Where the parts went: one folder per site, and the evaluator's held-out persons."""

    sites: list[Path]
    reference: Path
    unit: str
    """`person` when class folders name persons, else `image`."""
    num_images: dict[str, int]


def divide(source: Path, out: Path, num_sites: int, reference_ratio: float, seed: int) -> Division:
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
    owners = images.persons or images.names
    order = sorted(set(owners), key=lambda name: hashlib.sha256(f"divide {seed} {name}".encode()).digest())
    num_reference = max(1, round(reference_ratio * len(order)))
    if len(order) - num_reference < num_sites:
        raise InputError(f"images {source}: {len(order)} persons cannot be divided among {num_sites} sites: give more")
    place = dict.fromkeys(order[:num_reference], "reference")
    place |= {name: f"site-{index % num_sites}" for index, name in enumerate(order[num_reference:])}
    counts = copy_images(images, owners, place, out)
    return Division(
        sites=[out / f"site-{number}" for number in range(num_sites)],
        reference=out / "reference",
        unit="person" if images.persons else "image",
        num_images=counts,
    )


def copy_images(images: ImageSource, owners: tuple[str, ...], place: dict[str, str], out: Path) -> dict[str, int]:
    """Copy each image into `out`/<part of its owner>, a folder per owner; owners without a part are left out.

    Returns:
        Images of each part.
    """
    counts: dict[str, int] = {}
    for number, (name, owner) in enumerate(zip(images.names, owners, strict=True)):
        part = place.get(owner)
        if part is None:
            continue
        # Names inside a zip are not trusted with a path: folders are digests of the person, files are numbered.
        folder = out / part / hashlib.sha256(owner.encode()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:08d}{PurePosixPath(name).suffix.lower()}").write_bytes(images.read(name))
        counts[part] = counts.get(part, 0) + 1
    return counts
