"""Data have one identity: whatever is lost, killed, copied or relabelled, spending and the held-out split stay."""

import dataclasses
import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from client.data import scan as scan_module
from client.data.dataset import NotScannedError, current_id, open_dataset, scan
from client.home import Home
from client.private_files import write_private
from client.records.ledger import OutdatedDataError, open_ledger, read_ledger
from client.records.spending import Charge, Spending
from client.settings import SiteConfig, save_settings
from shared.data.images import ImageSource, list_images
from shared.data.synthetic import write_folder
from shared.errors import InputError
from tests.client.conftest import SIZE, MakeSite

SPENT = 16.5


def epsilon_of(history: list[Spending], delta: float) -> float:
    """A stand-in: epsilon is the number of steps over sigma."""
    return sum(row.steps / row.noise_multiplier for row in history)


def spend(home: Home, settings: SiteConfig, fingerprint: str = "") -> None:
    """One committed charge of 16.5 on the data set in use."""
    data = open_dataset(home, settings.image_size)
    charge = Charge(
        dataset_id=data.dataset_id, fingerprint=fingerprint or data.fingerprint, task="train", run="run",
        server_round=1, request_digest="r", plan_digest="p", mechanism="dp-sgd", noise_multiplier=2.0,
        sample_rate=0.1, steps=33,
    )  # fmt: skip
    with open_ledger(home.ledger, Path(settings.head_file)) as ledger:
        ledger.commit(ledger.reserve(charge, cap=100.0, delta=1e-5, epsilon_of=epsilon_of)[0])


def total(home: Home, settings: SiteConfig) -> float:
    """What a next round would find spent."""
    with open_ledger(home.ledger, Path(settings.head_file)) as ledger:
        return ledger.total(str(current_id(home)), 1e-5, epsilon_of).epsilon


def pixels(home: Home, settings: SiteConfig, part: str) -> set[bytes]:
    data = open_dataset(home, settings.image_size)
    return {data.images.images[row].tobytes() for row in getattr(data, part)}


@pytest.fixture
def others(tmp_path: Path) -> Path:
    """12 images of 3 other persons."""
    write_folder(tmp_path / "others", num_images=12, size=SIZE, seed=2, site="site7")
    return tmp_path / "others"


@pytest.fixture
def folder(tmp_path: Path, photos: Path) -> Path:
    shutil.copytree(photos, tmp_path / "own")
    return tmp_path / "own"


# What kills a scan.


class Cut(BaseException):
    """Stands for a kill: nothing may catch it."""


def cut_at(monkeypatch: pytest.MonkeyPatch, number: int) -> Callable[[], int]:
    """Let the `number`th durable step of this process never happen; how many steps there were."""
    count = 0

    def counted(step: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                raise Cut
            return step(*arguments, **options)

        return run

    for name in ("fsync", "rename", "replace", "link", "unlink", "rmdir", "ftruncate"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    return lambda: count


def add_spent_photos(make_site: MakeSite, photos: Path, others: Path) -> tuple[Home, SiteConfig]:
    """A spent set A, then a second set B at 0; A's photographs are then put among B's, under names that sort first."""
    home, settings = make_site(photos)
    spend(home, settings)
    settings = settings.model_copy(update={"data": str(others)})
    save_settings(home, settings)
    scan(home, settings, is_new=True)
    assert total(home, settings) == 0.0
    for person in sorted(photos.iterdir()):
        shutil.copytree(person, others / f"0-{person.name}")
    return home, settings


def check_whole(home: Home, settings: SiteConfig, before: set[bytes], spent: set[bytes]) -> None:
    """In use is the old set as it was, nothing, or the new one with all that its images have spent."""
    try:
        data = open_dataset(home, SIZE)
    except InputError:
        return
    used = {data.images.images[row].tobytes() for row in [*data.train, *data.held_out]}
    if used == before:
        return
    assert spent < used
    assert read_ledger(home.ledger).total(data.dataset_id, 1e-5, epsilon_of).epsilon == SPENT


def test_scan_that_is_cut_anywhere_leaves_one_whole_generation(
    make_site: MakeSite, photos: Path, others: Path, tmp_path: Path
):
    home, settings = add_spent_photos(make_site, photos, others)
    before = pixels(home, settings, "train") | pixels(home, settings, "held_out")
    spent = {*_decoded(photos)}
    state = tmp_path / "state"
    for name in ("home", "head", "registry"):
        shutil.copytree(tmp_path / name, state / name)
    number, num_steps = 0, 1
    while number < num_steps:
        number += 1
        for name in ("home", "head", "registry"):
            shutil.rmtree(tmp_path / name)
            shutil.copytree(state / name, tmp_path / name)
        with pytest.MonkeyPatch.context() as patch:
            steps = cut_at(patch, number)
            try:
                scan(home, settings)
            except Cut:
                num_steps = number + 1
        check_whole(home, settings, before, spent)
        if number % 5 == 1:
            scan(home, settings)
            assert total(home, settings) == SPENT
            assert pixels(home, settings, "train").isdisjoint(pixels(home, settings, "held_out"))
    assert number > 20
    assert steps() == number - 1


def _decoded(folder: Path) -> list[bytes]:
    from shared.data.pixels import decode

    return [decode(path.read_bytes(), SIZE).tobytes() for path in sorted(folder.rglob("*.png"))]


KILLED = """
import os, signal, sys
from pathlib import Path
from client.data import {module} as module
from client.data.dataset import scan
from client.home import Home
from client.settings import load_settings
step = module.{function}
def run(*arguments, **options):
    step(*arguments, **options)
    os.kill(os.getpid(), signal.SIGKILL)
module.{function} = run
home = Home(Path(sys.argv[1]))
scan(home, load_settings(home))
"""


@pytest.mark.parametrize(
    ("module", "function"),
    [("dataset", "build_images"), ("scan", "finish"), ("scan", "write_pointer")],
)
def test_killed_scan_never_trains_on_spent_images_for_free(
    make_site: MakeSite, photos: Path, others: Path, module: str, function: str
):
    home, settings = add_spent_photos(make_site, photos, others)
    before = pixels(home, settings, "train") | pixels(home, settings, "held_out")
    code = KILLED.format(module=module, function=function)
    done = subprocess.run([sys.executable, "-c", code, str(home.path)], check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    check_whole(home, settings, before, {*_decoded(photos)})
    scan(home, settings)
    assert total(home, settings) == SPENT


def test_file_that_cannot_be_read_again_stops_the_scan_and_loses_no_picture(
    make_site: MakeSite, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    def listed(path: Path) -> ImageSource:
        source = list_images(path)

        def read(name: str) -> bytes:
            if name == source.names[5]:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return source.read(name)

        return dataclasses.replace(source, read=read)

    home, settings = make_site(folder)
    before = pixels(home, settings, "train")
    with monkeypatch.context() as patch:
        patch.setattr(scan_module, "list_images", listed)
        with pytest.raises(InputError, match=r"Input/output error; cure it, then scan again"):
            scan(home, settings)
    scan(home, settings)
    assert pixels(home, settings, "train") == before


def test_data_opened_before_another_scan_are_not_charged(make_site: MakeSite, folder: Path):
    home, settings = make_site(folder)
    earlier = open_dataset(home, SIZE).fingerprint
    Image.new("RGB", (SIZE, SIZE), "red").save(next(folder.iterdir()) / "red.png")
    scan(home, settings)
    with pytest.raises(OutdatedDataError, match="scanned again meanwhile"):
        spend(home, settings, earlier)
    assert read_ledger(home.ledger).charges == []


def test_generation_that_the_ledger_does_not_name_is_refused(make_site: MakeSite, folder: Path, tmp_path: Path):
    home, settings = make_site(folder)
    shutil.copytree(home.datasets, tmp_path / "kept")
    Image.new("RGB", (SIZE, SIZE), "red").save(next(folder.iterdir()) / "red.png")
    scan(home, settings)
    shutil.rmtree(home.datasets)
    shutil.copytree(tmp_path / "kept", home.datasets)
    with pytest.raises(NotScannedError, match="the ledger does not name the images in use"):
        open_dataset(home, SIZE)


# What is lost.


def test_lost_key_stops_the_site_until_the_operator_decides(make_site: MakeSite):
    home, settings = make_site(held_out_ratio=0.5)
    spend(home, settings)
    held_out = pixels(home, settings, "held_out")
    entries = len(read_ledger(home.ledger).entries)
    home.data_key.unlink()
    for is_new in (False, True):
        with pytest.raises(InputError, match=r"data.key is missing: put it back .* `data scan --new-key`"):
            scan(home, settings, is_new=is_new)
    with pytest.raises(InputError, match=r"data.key is missing"):
        open_dataset(home, SIZE)
    assert len(read_ledger(home.ledger).entries) == entries
    assert not home.data_key.exists()
    found = scan(home, settings, is_key_lost=True)
    assert len(found.linked) == 1
    assert total(home, settings) == SPENT
    assert pixels(home, settings, "held_out") == held_out


@pytest.mark.parametrize("is_new", [False, True])
def test_foreign_key_is_refused_and_nothing_is_written(make_site: MakeSite, is_new: bool):
    home, settings = make_site()
    write_private(home.data_key, b"x" * 32)
    entries = len(read_ledger(home.ledger).entries)
    with pytest.raises(InputError, match=r"data.key is \w{16}, the images were scanned under \w{16}: put"):
        open_dataset(home, SIZE)
    with pytest.raises(InputError, match=r"put the right key back; if that is lost, remove this one and"):
        scan(home, settings, is_new=is_new)
    assert len(read_ledger(home.ledger).entries) == entries


def test_key_is_replaced_only_where_it_is_known_what_was_held_out(make_site: MakeSite, tmp_path: Path):
    home, settings = make_site(held_out_ratio=0.5)
    with pytest.raises(InputError, match=r"data.key is there"):
        scan(home, settings, is_key_lost=True)
    home.data_key.unlink()
    shutil.rmtree(tmp_path / "registry")
    with pytest.raises(InputError, match=r"neither data.key nor .* knows which images were held out"):
        scan(home, settings, is_key_lost=True)
    assert not home.data_key.exists()


def test_files_under_a_lost_key_count_as_the_same_data(make_site: MakeSite, others: Path):
    home, settings = make_site()
    spend(home, settings)
    home.data_key.unlink()
    found = scan(home, settings.model_copy(update={"data": str(others)}), is_key_lost=True)
    assert len(found.linked) == 1
    assert total(home, settings) == SPENT


def test_twin_of_a_file_that_was_trained_on_is_remembered(make_site: MakeSite, folder: Path):
    """The copy was dropped; alone, at another size, in a new data set, it still brings its spending along."""
    for path in sorted(folder.rglob("*.png")):
        with Image.open(path) as picture:
            picture.save(path.with_suffix(".bmp"))
    home, settings = make_site(folder)
    assert len(open_dataset(home, SIZE).train) + len(open_dataset(home, SIZE).held_out) == 24
    spend(home, settings)
    for path in [*folder.rglob("*.bmp")]:
        path.unlink()
    larger = settings.model_copy(update={"image_size": 2 * SIZE})
    found = scan(home, larger, is_new=True)
    assert len(found.linked) == 1
    assert total(home, larger) == SPENT


def test_photographs_saved_again_without_loss_are_the_same_data_at_any_size(make_site: MakeSite, folder: Path):
    for path in sorted(folder.rglob("*.png")):
        with Image.open(path) as picture:
            picture.resize((5 * SIZE, 4 * SIZE)).save(path.with_suffix(".jpg"))
        path.unlink()
    home, settings = make_site(folder, held_out_ratio=0.3)
    spend(home, settings)
    data = open_dataset(home, SIZE)
    held_out = {Path(data.images.names[row]).with_suffix("") for row in data.held_out}
    for path in sorted(folder.rglob("*.jpg")):
        with Image.open(path) as picture:
            picture.transpose(Image.Transpose.ROTATE_90).save(path.with_suffix(".png"))
        path.unlink()
    larger = settings.model_copy(update={"image_size": 2 * SIZE, "held_out_ratio": 0.0})
    assert scan(home, larger, is_new=True).linked
    assert total(home, larger) == SPENT
    data = open_dataset(home, 2 * SIZE)
    assert held_out
    assert held_out.isdisjoint(Path(data.images.names[row]).with_suffix("") for row in data.train)


def test_held_out_images_are_never_trained_on_by_a_new_data_set(make_site: MakeSite):
    home, settings = make_site(held_out_ratio=0.7)
    held_out = pixels(home, settings, "held_out")
    assert held_out
    scan(home, settings.model_copy(update={"held_out_ratio": 0.0}), is_new=True)
    assert pixels(home, settings, "train").isdisjoint(held_out)


# Persons.


def refile(folder: Path, target: Path, person_of: Callable[[int], str]) -> Path:
    for number, path in enumerate(sorted(folder.rglob("*.png"))):
        (target / person_of(number)).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target / person_of(number) / f"{number}.png")
    return target


def test_persons_that_are_regrouped_are_another_data_set_that_inherits(
    make_site: MakeSite, photos: Path, tmp_path: Path
):
    one = refile(photos, tmp_path / "one", lambda number: f"p{number // 4}")
    home, settings = make_site(one, held_out_ratio=0.0)
    first = current_id(home)
    spend(home, settings)
    shutil.rmtree(one)
    refile(photos, one, lambda number: f"p{number}")
    found = scan(home, settings)
    assert found.dataset_id != first
    assert found.is_regrouped
    assert found.linked == [first]
    assert total(home, settings) == SPENT
    mappings = [entry.fields["mapping"] for entry in read_ledger(home.ledger).entries if entry.kind == "dataset"]
    assert len(set(mappings)) == 2


def test_more_images_of_more_persons_are_the_same_data_set(make_site: MakeSite, folder: Path):
    home, settings = make_site(folder)
    first = current_id(home)
    (folder / "zz").mkdir()
    Image.new("RGB", (SIZE, SIZE), "red").save(folder / "zz" / "red.png")
    shutil.copy(next(folder.rglob("*.png")), folder / "zz" / "both.png")
    found = scan(home, settings)
    assert (found.dataset_id, found.is_regrouped) == (first, False)


def test_picture_of_two_persons_stays_in_both_units_and_is_one_image(make_site: MakeSite, photos: Path, tmp_path: Path):
    filed = refile(photos, tmp_path / "filed", lambda number: f"p{number // 4}")
    shutil.copy(filed / "p0" / "0.png", filed / "p1" / "both.png")
    home, _ = make_site(filed, held_out_ratio=0.0)
    data = open_dataset(home, SIZE)
    assert sorted(map(len, data.units("person"))) == [4, 4, 4, 4, 4, 5]
    assert len(data.units("image")) == len(data.train) == 24


# Two homes.


def second_home(
    tmp_path: Path, settings: SiteConfig, name: str = "second", **changes: object
) -> tuple[Home, SiteConfig]:
    home = Home(tmp_path / name)
    own = settings.model_copy(update={"head_file": str(tmp_path / f"{name}-head" / "head.json"), **changes})
    home.path.mkdir()
    save_settings(home, own)
    return home, own


def test_two_homes_on_one_folder_share_one_budget(make_site: MakeSite, tmp_path: Path):
    home, settings = make_site()
    other, own = second_home(tmp_path, settings)
    spend(home, settings)
    found = scan(other, own)
    assert found.homes == [str(home.path)]
    assert f"shares files with {home.path}: what is spent in one home is spent in all" in list(found.lines(own.policy))
    assert total(other, own) == SPENT
    spend(other, own)
    assert total(other, own) == total(home, settings) == 2 * SPENT
    spend(home, settings)
    assert total(other, own) == total(home, settings) == 3 * SPENT


def test_homes_that_share_one_picture_through_a_third_share_the_budget(
    make_site: MakeSite, tmp_path: Path, folder: Path, others: Path
):
    home, settings = make_site(folder)
    other, own = second_home(tmp_path, settings, data=str(others))
    scan(other, own)
    spend(home, settings)
    assert total(other, own) == 0.0
    for path in (next(folder.rglob("*.png")), next(others.rglob("*.png"))):
        (tmp_path / "bridge" / path.parent.name).mkdir(parents=True)
        shutil.copy(path, tmp_path / "bridge" / path.parent.name)
    third, its = second_home(tmp_path, settings, "third", data=str(tmp_path / "bridge"), held_out_ratio=0.0)
    scan(third, its)
    assert total(third, its) == total(other, own) == SPENT


def test_image_that_one_home_holds_out_is_not_trained_on_in_another(make_site: MakeSite, tmp_path: Path):
    home, settings = make_site(held_out_ratio=0.5)
    other, own = second_home(tmp_path, settings, held_out_ratio=0.0)
    scan(other, own)
    assert pixels(other, own, "train").isdisjoint(pixels(home, settings, "held_out"))


def test_deleted_home_leaves_its_spending(make_site: MakeSite, tmp_path: Path):
    home, settings = make_site()
    spend(home, settings)
    shutil.rmtree(home.path)
    other, own = second_home(tmp_path, settings)
    scan(other, own)
    assert total(other, own) == SPENT


def test_registry_that_was_removed_asks_for_a_scan(make_site: MakeSite, tmp_path: Path):
    home, settings = make_site()
    spend(home, settings)
    shutil.rmtree(tmp_path / "registry")
    with pytest.raises(NotScannedError, match="registry of this machine does not know the images in use"):
        open_dataset(home, SIZE)
    scan(home, settings)
    other, own = second_home(tmp_path, settings)
    scan(other, own)
    assert total(other, own) == SPENT


def test_records_that_cannot_be_compared_count_as_the_same_data(make_site: MakeSite, tmp_path: Path, others: Path):
    home, settings = make_site()
    spend(home, settings)
    (records,) = (tmp_path / "registry").glob("*.records")
    records.write_text("{}")
    other, own = second_home(tmp_path, settings, data=str(others))
    assert scan(other, own).homes == [str(home.path)]
    assert total(other, own) == SPENT
