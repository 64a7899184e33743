"""The image sets of a study, divided by person once and kept as folders and caches that every command reads."""

import hashlib
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from server.simulation.division import copy_images
from server.studies.schema import Arm, Study
from shared.data.decoding import OnProgress
from shared.data.image_cache import BuildOptions, build_cache
from shared.data.image_set import ImageCache
from shared.data.images import ImageSource, list_images
from shared.data.synthetic import write_folder
from shared.errors import InputError
from shared.storage.files import TEMPORARY_PREFIX

LEAST_IMAGES = 10
"""Of a split that distances are measured against."""
SYNTHETIC_SITES = {"public": "public", "private": "heldout"}


@dataclass(frozen=True)
class Part:
    """One split, or a share of one."""

    folder: Path
    """Image files, a folder per person."""
    cache: Path
    images: ImageCache
    facts: dict[str, str | int]
    """What a result says of it: no path, no image."""


class Splits:
    """Parts of a study's two image sets, made when they are asked for."""

    def __init__(
        self, study: Study, sources: dict[str, str], root: Path, size: int, num_synthetic: int, on_progress: OnProgress
    ) -> None:
        """Divide what has not been divided yet.

        Args:
            study: names the splits.
            sources: folder or zip of `public` and `private` images; empty: synthetic faces.
            root: folder of all divisions.
            size: side of decoded images in pixels.
            num_synthetic: synthetic images of each set.
            on_progress: told images decoded and in all.

        Raises:
            InputError: no images there, or fewer persons than splits.
        """
        self.study, self.size, self._on_progress = study, size, on_progress
        self._names = {
            source: Path(path).name or path if path else f"{num_synthetic} synthetic faces"
            for source, path in sources.items()
        }
        wanted = {split.source for split in study.splits.values()}
        self._folders = {
            source: _division(study, source, sources[source], root, size, num_synthetic) for source in sorted(wanted)
        }

    def part(self, name: str, share: float = 1.0) -> Part:
        """A split, or a share of it: whole persons in a seeded order, so that a smaller share is part of a larger.

        Raises:
            InputError: the share is less than one image.
        """
        source = self.study.splits[name].source
        whole = self._folders[source] / name
        folder = whole if share == 1 else whole.with_name(f"{name}-{share:g}")
        if not folder.exists():
            _in_one_go(folder, lambda place: _take(list_images(whole), share, self.study.seed, place))
        cache = folder.with_name(f"{folder.name}-{self.size}.cache")
        images = build_cache(
            folder, cache, self.size, options=BuildOptions(is_owner=True), on_progress=self._on_progress
        )
        persons = images.persons
        facts: dict[str, str | int] = {
            "set": self._names[source],
            "split": name,
            "share": f"{share:g}",
            "images": len(images),
            "persons": len(images) if persons is None else len(np.unique(persons)),
            "sha256": hashlib.sha256(np.ascontiguousarray(images.images).tobytes()).hexdigest(),
        }
        return Part(folder, cache, images, facts)

    def of(self, arm: Arm) -> dict[str, Part]:
        """The parts of an arm: `train`, and `test` and `validation` where it is measured.

        Raises:
            InputError: too few images to measure against.
        """
        parts = {"train": self.part(arm.split, arm.share)}
        for role, name in (("test", arm.test), ("validation", arm.validation)):
            if name:
                parts[role] = self.part(name)
                if (count := len(parts[role].images)) < LEAST_IMAGES:
                    raise InputError(
                        f"split {name!r} has {count} images, at least {LEAST_IMAGES} are needed: give more images"
                    )
        return parts


def _division(study: Study, source: str, path: str, root: Path, size: int, num_synthetic: int) -> Path:
    """Folder with a sub-folder per split of one set."""
    shares = {name: split.share for name, split in study.splits.items() if split.source == source}
    if path:
        found = list_images(Path(path))
        identity = found.fingerprint
    else:
        identity = f"synthetic {SYNTHETIC_SITES[source]} {num_synthetic} {size}"
    key = hashlib.sha256(f"{identity} {study.seed} {shares}".encode()).hexdigest()[:12]
    folder = root / f"{source}-{key}"

    def fill(place: Path) -> None:
        if path:
            _divide(found, shares, study.seed, place)
            return
        drawn = place.with_name(f"{place.name}-drawn")
        shutil.rmtree(drawn, ignore_errors=True)
        write_folder(drawn, num_synthetic, size, study.seed, site=SYNTHETIC_SITES[source])
        _divide(list_images(drawn), shares, study.seed, place)
        shutil.rmtree(drawn)

    if not folder.exists():
        _in_one_go(folder, fill)
    return folder


def _divide(found: ImageSource, shares: dict[str, float], seed: int, out: Path) -> None:
    order = _shuffled(set(found.owners), "split", seed)
    ends = np.floor(np.cumsum(list(shares.values())) * len(order) + 0.5).astype(int)
    place: dict[str, str] = {}
    for name, start, end in zip(shares, [0, *ends[:-1]], ends, strict=True):
        if end <= start:
            raise InputError(
                f"images {found.path}: {len(order)} persons leave none for split {name!r}, {shares[name]:.0%} of them: "
                "give more"
            )
        place |= dict.fromkeys(order[start:end], name)
    copy_images(found, [place.get(owner) for owner in found.owners], out)


def _take(found: ImageSource, share: float, seed: int, out: Path) -> None:
    wanted, taken = share * len(found.names), 0
    if wanted < 1:
        raise InputError(
            f"{share:.3g} of the {len(found.names)} images of {found.path.name!r} is less than one: give more"
        )
    chosen: set[str] = set()
    counts = Counter(found.owners)
    for owner in _shuffled(set(found.owners), "share", seed):
        if taken >= wanted:
            break
        chosen.add(owner)
        taken += counts[owner]
    copy_images(found, ["taken" if owner in chosen else None for owner in found.owners], out)
    for person in (out / "taken").iterdir():
        person.rename(out / person.name)
    (out / "taken").rmdir()


def _shuffled(owners: set[str], purpose: str, seed: int) -> list[str]:
    """A person's place depends on seed and name only."""
    return sorted(owners, key=lambda name: hashlib.sha256(f"{purpose} {seed} {name}".encode()).digest())


def _in_one_go(folder: Path, fill: Callable[[Path], None]) -> None:
    """Fill a new folder under another name, so that a killed process leaves no half of it."""
    unfinished = folder.with_name(f"{TEMPORARY_PREFIX}{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    fill(unfinished)
    unfinished.rename(folder)
