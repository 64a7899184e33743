"""Homes of one machine see each other's data sets and charges; what others have written is checked."""

import os
from pathlib import Path

import pytest

from client.records import data_registry as registry_module
from client.records.chain import BusyError
from client.records.data_key import key_id
from client.records.data_registry import DataRegistry, Identity, Records, existing_registry, registry_folder
from client.records.spending import Charge
from shared.errors import InputError

ONE, OTHER = "1" * 32, "2" * 32
CHARGE = Charge(
    dataset_id=ONE, fingerprint="f", task="train", run="run", server_round=1, request_digest="r", plan_digest="p",
    mechanism="dp-sgd", noise_multiplier=1.5, sample_rate=0.25, steps=7,
)  # fmt: skip


def identity(dataset_id: str = ONE) -> Identity:
    return Identity(dataset_id=dataset_id, ledger_id="a" * 32, home="/site", key_id="k", fingerprint="f", linked=())


@pytest.fixture
def registry(tmp_path: Path) -> DataRegistry:
    made = DataRegistry(tmp_path / "registry")
    made.prepare()
    return made


@pytest.fixture
def shared(tmp_path: Path) -> DataRegistry:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o2770)
    return DataRegistry(tmp_path / "shared")


def test_what_is_published_comes_back(registry: DataRegistry):
    with registry.locked():
        registry.publish(identity(), Records(key_id="k", records={"x": True, "y": False, "z": None}))
        registry.publish_charges("a" * 32, [(3, CHARGE)])
    assert registry.identities() == {ONE: identity()}
    assert registry.records(ONE, "k") == Records(key_id="k", records={"x": True, "y": False, "z": None})
    assert registry.charges("a" * 32) == ((3, CHARGE),)
    assert registry.charges("b" * 32) == ()
    assert registry.knows(ONE, "f", "k")
    assert not any((registry.knows(OTHER, "f", "k"), registry.knows(ONE, "g", "k"), registry.knows(ONE, "f", "l")))


def test_records_under_another_key_or_damaged_cannot_be_compared(registry: DataRegistry):
    registry.publish(identity(), Records(key_id="k", records={}))
    assert registry.records(ONE, "another") is None
    (registry.folder / f"{ONE}.records").write_text("{")
    assert registry.records(ONE, "k") is None
    assert registry.records(OTHER, "k") is None


def test_files_are_the_users_own_or_the_groups(registry: DataRegistry, shared: DataRegistry):
    for each, mode in ((registry, 0o600), (shared, 0o660)):
        with each.locked():
            each.machine_key()
            each.publish(identity(), Records(key_id="k", records={}))
            each.publish_charges("a" * 32, [])
        assert {path.stat().st_mode & 0o777 for path in each.folder.iterdir()} == {mode}


def test_registry_that_everybody_can_look_into_is_refused(registry: DataRegistry):
    registry.folder.chmod(0o777)
    with pytest.raises(InputError, match="others may look: chmod o-rwx"), registry.locked():
        pass


def test_machine_key_is_made_once_and_never_in_place_of_a_lost_one(registry: DataRegistry):
    key = registry.machine_key()
    assert registry.machine_key() == key
    assert len(key) == 32
    registry.publish(identity(), Records(key_id="k", records={}))
    (registry.folder / "machine.key").unlink()
    with pytest.raises(InputError, match=r"machine.key is missing: restore it; if it is lost, remove"):
        registry.machine_key()
    (registry.folder / "machine.key").write_bytes(b"short")
    with pytest.raises(InputError, match=r"machine.key is damaged"):
        registry.machine_key()


@pytest.mark.parametrize("text", ["{", "{}", '{"dataset_id": "../x"}', identity(OTHER).model_dump_json()])
def test_file_that_is_no_data_set_is_named(registry: DataRegistry, text: str):
    (registry.folder / f"{ONE}.json").write_text(text)
    with pytest.raises(InputError, match=f"{ONE}.json is damaged: restore it, or remove it and scan again"):
        registry.identities()


def test_links_and_pipes_of_other_users_are_not_opened(registry: DataRegistry, tmp_path: Path):
    (tmp_path / "secret").write_text(identity().model_dump_json())
    (registry.folder / f"{ONE}.json").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match="is damaged"):
        registry.identities()
    (registry.folder / f"{ONE}.json").unlink()
    os.mkfifo(registry.folder / f"{ONE}.json")
    with pytest.raises(InputError, match="is no file of a registry"):
        registry.identities()


def test_home_that_holds_the_registry_for_ever_is_named(registry: DataRegistry, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(registry_module, "LOCK_SECONDS", 0.05)
    with registry.locked(), pytest.raises(BusyError, match="held by another home"), registry.locked():
        pass


def test_folder_is_named_or_the_machines_or_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("MASKFED_REGISTRY", "relative")
    with pytest.raises(InputError, match="absolute"):
        registry_folder()
    monkeypatch.delenv("MASKFED_REGISTRY")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(registry_module, "MACHINE_FOLDER", tmp_path / "machine")
    assert registry_folder() == tmp_path / "state" / "maskfed" / "registry"
    assert existing_registry() is None
    (tmp_path / "machine").mkdir()
    assert registry_folder() == tmp_path / "machine"
    assert existing_registry() is not None


def test_name_of_a_key_tells_keys_apart():
    assert key_id(bytes(32)) == key_id(bytes(32)) != key_id(bytes(31) + b"1")
