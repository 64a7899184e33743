"""Attacks on the identity of data: spent images are trained on while the ledger says that nothing was spent.

Each guard is switched off by taking away the one function that it rests on.
"""

import contextlib
import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np

from benchmarks.privacy_attacks.outcome import Outcome
from benchmarks.privacy_attacks.tiny_sites import SIZE, Site, draw, file_away, repeat
from client.data import dataset, generations, scan
from client.data.dataset import open_dataset
from client.data.file_records import Seen, look
from client.data.generations import BUILDING, IMAGES, folder_of, read_pointer
from client.data.held_out import first_of_each
from client.data.scan import Scanner
from client.records.data_key import create_data_key
from shared.errors import InputError


class _Killed(BaseException):
    """Stands for a kill: nothing may catch it."""


def interrupted_scan(root: Path, random: np.random.Generator, is_guarded: bool) -> bool:
    """Spent photographs are put among the images of an unspent set; the scan dies as soon as they are decoded."""
    spent, fresh = draw(random, 4), draw(random, 4)
    first = file_away(root / "first", {f"{n}.ppm": data for n, data in enumerate(spent)})
    site = Site.make(root / "site", first)
    dataset.scan(site.home, site.settings)
    site.spend()
    second = file_away(root / "second", {f"b{n}.ppm": data for n, data in enumerate(fresh)})
    site = Site(site.home, site.settings.model_copy(update={"data": str(second)}))
    dataset.scan(site.home, site.settings, is_new=True)
    file_away(second, {f"a{n}.ppm": data for n, data in enumerate(spent)})
    with contextlib.suppress(_Killed), mock.patch.object(Scanner, "run", side_effect=_Killed):
        dataset.scan(site.home, site.settings)
    with contextlib.ExitStack() as guard_off:
        if not is_guarded:
            pointer = read_pointer(site.home)
            assert pointer is not None
            in_use = folder_of(site.home, pointer) / IMAGES
            shutil.rmtree(in_use)
            shutil.copytree(site.home.datasets / BUILDING / IMAGES, in_use)
            guard_off.enter_context(mock.patch.object(dataset, "check_index"))
        try:
            data = open_dataset(site.home, SIZE)
        except InputError:
            return False
    used = {data.images.images[row].transpose(1, 2, 0).tobytes() for row in data.train}
    return site.spent() == 0 and any(each[-3 * SIZE * SIZE :] in used for each in spent)


def lost_key(root: Path, random: np.random.Generator, is_guarded: bool) -> bool:
    """data.key is gone, and the same images are scanned as new ones."""
    photos = file_away(root / "photos", {f"{n}.ppm": data for n, data in enumerate(draw(random, 4))})
    site = Site.make(root / "site", photos)
    with contextlib.ExitStack() as guard_off:
        if not is_guarded:
            for module in (scan, generations):
                guard_off.enter_context(mock.patch.object(module, "key_id", lambda key: "the same"))
        dataset.scan(site.home, site.settings)
        site.spend()
        site.home.data_key.unlink()
        try:
            if not is_guarded:
                create_data_key(site.home)
            dataset.scan(site.home, site.settings, is_new=True)
        except InputError:
            dataset.scan(site.home, site.settings, is_key_lost=True)
        return site.spent() == 0


def two_homes(root: Path, random: np.random.Generator, is_guarded: bool) -> bool:
    """A second home, for a second coordinator, on images that the first one has spent."""
    photos = file_away(root / "photos", {f"{n}.ppm": data for n, data in enumerate(draw(random, 4))})
    one, other = (Site.make(root / name, photos) for name in ("one", "other"))
    dataset.scan(one.home, one.settings)
    one.spend()
    with contextlib.ExitStack() as guard_off:
        if not is_guarded:
            guard_off.enter_context(mock.patch.object(Scanner, "_shares", return_value=False))
        dataset.scan(other.home, other.settings)
    return other.spent() == 0


def dropped_twin(root: Path, random: np.random.Generator, is_guarded: bool) -> bool:
    """Only the copies that were dropped are left, and they are scanned at another size as new images."""
    spent = draw(random, 4)
    # The same pixels in a file of other bytes: one comment more.
    twins = [data.replace(b"P6 ", b"P6\n#\n", 1) for data in spent]
    photos = file_away(root / "photos", {f"a{n}.ppm": data for n, data in enumerate(spent)})
    file_away(photos, {f"b{n}.ppm": data for n, data in enumerate(twins)})
    site = Site.make(root / "site", photos)
    with contextlib.ExitStack() as guard_off:
        if not is_guarded:
            guard_off.enter_context(mock.patch.object(scan, "look", _look_at_kept))
        dataset.scan(site.home, site.settings)
        site.spend()
        for path in photos.glob("a*.ppm"):
            path.unlink()
        larger = Site(site.home, site.settings.model_copy(update={"image_size": 2 * SIZE}))
        dataset.scan(larger.home, larger.settings, is_new=True)
    return larger.spent() == 0


def _look_at_kept(*arguments: object) -> Seen:
    """Records without those of copies and without samples, as scans once kept them."""
    seen = look(*arguments)  # type: ignore[arg-type]  # handed on as they are
    seen.pictures = [each._replace(records=each.records[:2]) for each in seen.pictures]
    seen.machine_records = [each[:2] for each in seen.machine_records]
    rows = {each.row for each in first_of_each(seen.pictures)}
    kept = [number for number, each in enumerate(seen.pictures) if each.row in rows]
    return Seen(
        pictures=[seen.pictures[number] for number in kept],
        machine_records=[seen.machine_records[number] for number in kept],
        files=[seen.pictures[number].records[0] for number in kept],
        machine_files=[seen.machine_records[number][0] for number in kept],
        sides=[seen.sides[number] for number in kept],
    )


ATTACKS: dict[str, Callable[[int, bool, int], Outcome]] = {
    name: functools.partial(repeat, name, trial)
    for name, trial in (
        ("interrupted scan", interrupted_scan),
        ("lost key", lost_key),
        ("two homes", two_homes),
        ("dropped twin", dropped_twin),
    )
}
