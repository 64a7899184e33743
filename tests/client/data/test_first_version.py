"""A home of the first version goes on with all its spending and its held-out split.

`first_version/` holds what that version (commit b96a1ff) has written for these 24 pictures of 6 persons under a key of
zeros, half held out, after one charge of 33 steps at sigma 2.
"""

import shutil
from pathlib import Path

import pytest

from client.data.dataset import NotScannedError, current_id, open_dataset, scan
from client.home import Home
from client.private_files import write_private
from client.records.ledger import open_ledger
from client.records.spending import Spending
from client.settings import SiteConfig, save_settings

KEPT = Path(__file__).parent / "first_version"
SPENT = 16.5
HELD_OUT = {"person2", "person3", "person5"}


def epsilon_of(history: list[Spending], delta: float) -> float:
    return sum(row.steps / row.noise_multiplier for row in history)


def total(home: Home, settings: SiteConfig) -> float:
    with open_ledger(home.ledger, Path(settings.head_file)) as ledger:
        return ledger.total(str(current_id(home)), 1e-5, epsilon_of).epsilon


@pytest.fixture
def site(tmp_path: Path) -> tuple[Home, SiteConfig]:
    for number in range(24):
        path = tmp_path / "photos" / f"person{number // 4}" / f"{number}.ppm"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"P6 16 16 255\n" + bytes((7 * k + 11 * number) % 256 for k in range(768)))
    home = Home(tmp_path / "home")
    settings = SiteConfig(
        alias="a",
        address="127.0.0.1:1",
        data=str(tmp_path / "photos"),
        image_size=16,
        held_out_ratio=0.5,
        head_file=str(tmp_path / "head" / "head.json"),
    )
    save_settings(home, settings)
    write_private(home.data_key, bytes(32))
    dataset_id = (KEPT / "current").read_text()
    for name, target in (
        ("ledger.jsonl", home.ledger),
        ("current", home.datasets / "current"),
        ("split.json", home.datasets / dataset_id / "split.json"),
        ("index-16.json", home.datasets / dataset_id / "index-16.json"),
        ("head.json", Path(settings.head_file)),
    ):
        write_private(target, (KEPT / name).read_bytes())
    return home, settings


def held_out(home: Home) -> set[str]:
    data = open_dataset(home, 16)
    return {data.images.names[row].split("/")[0] for row in data.held_out}


def test_nothing_is_opened_before_a_scan(site: tuple[Home, SiteConfig]):
    with pytest.raises(NotScannedError, match="scanned by an earlier version: run `maskfed-client data scan`"):
        open_dataset(site[0], 16)
    assert total(*site) == SPENT


def test_scan_goes_on_with_data_set_spending_and_split(site: tuple[Home, SiteConfig]):
    home, settings = site
    found = scan(home, settings)
    assert (found.dataset_id, found.linked, found.is_regrouped) == ((KEPT / "current").read_text(), [], False)
    assert total(home, settings) == SPENT
    assert held_out(home) == HELD_OUT


def test_data_set_that_was_never_compared_inherits(site: tuple[Home, SiteConfig], tmp_path: Path):
    """The old records do not say under which key they are."""
    home, settings = site
    (tmp_path / "others" / "ann").mkdir(parents=True)
    for number in range(2):
        (tmp_path / "others" / "ann" / f"{number}.ppm").write_bytes(b"P6 16 16 255\n" + bytes([number]) * 768)
    other = settings.model_copy(update={"data": str(tmp_path / "others"), "held_out_ratio": 0.0})
    assert scan(home, other, is_new=True).linked == [(KEPT / "current").read_text()]
    assert total(home, other) == SPENT


def test_albums_that_were_persons_are_another_data_set_that_inherits(site: tuple[Home, SiteConfig], tmp_path: Path):
    home, settings = site
    for number in range(6):
        shutil.move(
            tmp_path / "photos" / f"person{number}", tmp_path / "photos" / f"p{number // 2}" / f"person{number}"
        )
    found = scan(home, settings.model_copy(update={"person_depth": 1}))
    assert found.is_regrouped
    assert found.linked == [(KEPT / "current").read_text()]
    assert total(home, settings) == SPENT


def test_lost_key_is_not_replaced_in_silence(site: tuple[Home, SiteConfig]):
    home, settings = site
    home.data_key.unlink()
    with pytest.raises(ValueError, match=r"data.key is missing"):
        scan(home, settings, is_new=True)
    assert not home.data_key.exists()
