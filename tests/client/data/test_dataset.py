"""Scanning: what is trained on, what never is, and what a later scan remembers."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from client.data.dataset import NotScannedError, current_id, open_dataset, scan
from client.records.chain import BusyError
from client.records.ledger import open_ledger, read_ledger
from client.settings import SiteConfig
from shared.data.synthetic import write_folder
from shared.errors import InputError
from tests.client.conftest import SIZE, MakeSite


@pytest.fixture
def folder(tmp_path: Path, photos: Path) -> Path:
    target = tmp_path / "own"
    shutil.copytree(photos, target)
    return target


def held_out_names(home: object, settings: SiteConfig) -> set[str]:
    data = open_dataset(home, settings.image_size)
    return {data.images.names[row] for row in data.held_out}


def test_persons_are_held_out_whole(make_site: MakeSite):
    home, _ = make_site(held_out_ratio=0.5)
    data = open_dataset(home, SIZE)
    assert data.persons is not None
    train, held_out = set(data.persons[data.train]), set(data.persons[data.held_out])
    assert train
    assert held_out
    assert train.isdisjoint(held_out)
    assert len(data.train) + len(data.held_out) == 24


def test_split_that_leaves_nothing_to_train_on_is_refused(make_site: MakeSite):
    with pytest.raises(InputError, match=r"sets all 24 images of .* aside"):
        make_site(held_out_ratio=0.999999)


def test_adding_images_keeps_id_and_split(make_site: MakeSite, folder: Path):
    home, settings = make_site(folder, held_out_ratio=0.5)
    first, before = current_id(home), held_out_names(home, settings)
    held_person = folder / sorted(before)[0].split("/")[0]
    Image.fromarray(np.full((SIZE, SIZE, 3), 7, np.uint8)).save(held_person / "new.png")
    (folder / "zz-new-person").mkdir()
    Image.fromarray(np.full((SIZE, SIZE, 3), 9, np.uint8)).save(folder / "zz-new-person" / "1.png")
    found = scan(home, settings)
    assert found.dataset_id == first
    after = held_out_names(home, settings)
    assert before <= after
    assert f"{held_person.name}/new.png" in after


def test_held_out_image_stays_so_under_another_name_and_encoding(make_site: MakeSite, folder: Path):
    home, settings = make_site(folder, held_out_ratio=0.5)
    name = sorted(held_out_names(home, settings))[0]
    with Image.open(folder / name) as picture:
        picture.save(folder / f"{name.split('/')[0]}" / "0000.bmp")
    (folder / "aa").mkdir()
    shutil.copy(folder / name.split("/")[0] / "0000.bmp", folder / "aa" / "renamed.bmp")
    scan(home, settings)
    data = open_dataset(home, SIZE)
    pixels = {data.images.images[row].tobytes() for row in data.held_out}
    assert pixels.isdisjoint(data.images.images[row].tobytes() for row in data.train)


def test_exact_duplicates_are_dropped(make_site: MakeSite, folder: Path):
    source = sorted(folder.rglob("*.png"))[0]
    shutil.copy(source, source.with_name("copy.png"))
    with Image.open(source) as picture:
        picture.save(source.with_name("same-pixels.bmp"))
    home, settings = make_site(folder)
    data = open_dataset(home, SIZE)
    assert len(data.train) + len(data.held_out) == 24
    assert scan(home, settings).num_duplicates == 2


def test_unreadable_files_are_counted_and_left_out(make_site: MakeSite, folder: Path):
    (folder / next(folder.iterdir()).name / "broken.jpg").write_bytes(b"no picture")
    home, settings = make_site(folder)
    assert scan(home, settings).num_unreadable == 1
    assert "broken" not in str(open_dataset(home, SIZE).images.names)


def test_scan_tells_the_operator_counts_persons_sizes_and_problems(make_site: MakeSite, folder: Path):
    person = next(path for path in sorted(folder.iterdir()) if path.is_dir())
    Image.new("RGB", (8, 60)).save(person / "small.png")
    Image.new("RGB", (90, 40), "red").save(person / "large.png")
    (person / "broken.jpg").write_bytes(b"no picture")
    home, settings = make_site(folder, held_out_ratio=0.0)
    found = scan(home, settings)
    assert list(found.lines(settings.policy)) == [
        f"data set {found.dataset_id}: 26 images to train on at 16 x 16 pixels",
        "held out for audits, never trained on: 0 (0 of 6 persons)",
        "shorter side of the files: 8 to 40 pixels, median 16",
        "dropped: 0 duplicates, 1 unreadable, named in logs/scan.log",
        "PROBLEM: 1 files are smaller than 16 pixels and were enlarged",
    ]
    (folder / "stray.png").write_bytes((person / "large.png").read_bytes())
    asked = settings.policy.model_copy(update={"unit": "person", "min_images_train": 1000})
    problems = [line for line in scan(home, settings).lines(asked) if line.startswith("PROBLEM")]
    assert problems[1:] == [
        "PROBLEM: training is refused below policy.min_images_train, which is 1000",
        "PROBLEM: policy.unit is 'person': training with DP is refused. Give one folder per person and no image beside "
        "the folders, or `identities`, and scan again.",
    ]


def test_cache_that_is_not_complete_asks_for_a_scan(make_site: MakeSite):
    home, _ = make_site()
    (pixels,) = home.datasets.rglob("images.u8")
    pixels.write_bytes(pixels.read_bytes()[:-1])
    with pytest.raises(NotScannedError, match=r"not complete: run `maskfed-client data scan`"):
        open_dataset(home, SIZE)


@pytest.mark.parametrize("name", ["cache.json", "split.json", "index.json"])
@pytest.mark.parametrize("is_missing", [True, False])
def test_file_of_a_generation_that_is_missing_or_changed_asks_for_a_scan(
    make_site: MakeSite, name: str, is_missing: bool
):
    home, settings = make_site()
    for path in home.datasets.rglob(name):
        text = path.read_bytes()
        path.unlink()
        if not is_missing:
            path.write_bytes(text.replace(b"24", b"23", 1) if b"24" in text else text.replace(b"1", b"0", 1))
    with pytest.raises(NotScannedError, match=r"run `maskfed-client data scan`"):
        open_dataset(home, SIZE)
    scan(home, settings)
    assert len(open_dataset(home, SIZE).images) == 24


def test_empty_folder_is_refused_and_nothing_is_current(make_site: MakeSite, tmp_path: Path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match="no image file"):
        make_site(empty)


def test_second_data_set_that_shares_files_inherits_the_history(make_site: MakeSite):
    home, settings = make_site()
    first = current_id(home)
    found = scan(home, settings, is_new=True)
    assert found.dataset_id != first
    assert found.linked == [first]
    assert read_ledger(home.ledger).linked(found.dataset_id) == {first, found.dataset_id}


def test_data_set_without_shared_files_is_counted_apart(make_site: MakeSite, tmp_path: Path):
    home, settings = make_site()
    other = tmp_path / "others"
    write_folder(other, num_images=8, size=SIZE, seed=2)
    assert scan(home, settings.model_copy(update={"data": str(other)}), is_new=True).linked == []


def test_lost_cache_does_not_reset_the_spending(make_site: MakeSite):
    home, settings = make_site()
    first = current_id(home)
    shutil.rmtree(home.datasets)
    found = scan(home, settings)
    assert found.dataset_id != first
    assert found.linked == [first]


def test_another_image_size_is_the_same_data_set_with_the_same_split(make_site: MakeSite):
    home, settings = make_site(held_out_ratio=0.5)
    first, before = current_id(home), held_out_names(home, settings)
    larger = settings.model_copy(update={"image_size": 2 * SIZE})
    assert scan(home, larger).dataset_id == first
    assert held_out_names(home, larger) == before
    with pytest.raises(NotScannedError, match="no images of 16 pixels are scanned, those in use have 32"):
        open_dataset(home, SIZE)
    scan(home, settings)
    assert held_out_names(home, settings) == before


def test_scan_of_the_same_files_changes_nothing(make_site: MakeSite):
    home, settings = make_site()
    first, (pixels,) = open_dataset(home, SIZE).fingerprint, home.datasets.rglob("images.u8")
    entries, inode = len(read_ledger(home.ledger).entries), pixels.stat().st_ino
    scan(home, settings)
    assert open_dataset(home, SIZE).fingerprint == first
    assert len(read_ledger(home.ledger).entries) == entries
    assert pixels.stat().st_ino == inode, "nothing is decoded again"


def test_earlier_generations_are_deleted(make_site: MakeSite, folder: Path):
    home, settings = make_site(folder)
    Image.new("RGB", (SIZE, SIZE), "red").save(next(folder.iterdir()) / "red.png")
    scan(home, settings)
    assert len(list(home.datasets.rglob("images.u8"))) == 1
    assert not (home.datasets / "building").exists()


def test_units_are_images_or_persons(make_site: MakeSite):
    home, _ = make_site(held_out_ratio=0.0)
    data = open_dataset(home, SIZE)
    assert [len(unit) for unit in data.units("image")] == [1] * 24
    persons = data.units("person")
    assert [len(unit) for unit in persons] == [4] * 6
    assert data.persons is not None
    assert all(len(set(data.persons[unit])) == 1 for unit in persons)
    assert sorted(np.concatenate(persons)) == list(range(24))


def test_images_without_persons_have_no_person_units(make_site: MakeSite, tmp_path: Path, photos: Path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, path in enumerate(sorted(photos.rglob("*.png"))):
        shutil.copy(path, flat / f"{number}.png")
    home, _ = make_site(flat)
    data = open_dataset(home, SIZE)
    assert 0 < len(data.held_out) < 24
    with pytest.raises(InputError, match="not sorted by person"):
        data.units("person")


def test_cache_is_private(make_site: MakeSite):
    home, _ = make_site()
    assert home.datasets.stat().st_mode & 0o077 == 0
    for path in home.datasets.rglob("*"):
        if path.is_dir():
            assert path.stat().st_mode & 0o077 == 0, path


def test_scan_waits_for_no_running_round(make_site: MakeSite):
    home, settings = make_site()
    with open_ledger(home.ledger, Path(settings.head_file)), pytest.raises(BusyError):
        scan(home, settings)


def test_data_set_that_was_never_scanned_is_named(make_site: MakeSite):
    home, _ = make_site()
    with pytest.raises(InputError, match="data scan"):
        open_dataset(home, 4 * SIZE)
