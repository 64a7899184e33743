"""`site.toml` is private, complete and spelled right, or nothing happens."""

import os
from pathlib import Path

import pytest

from client.home import Home, find_home
from client.private_files import private_files, write_private
from client.records.data_key import create_data_key, read_data_key
from client.settings import SitePolicy, load_settings, save_settings
from shared.errors import InputError
from tests.client.conftest import MakeSite


def test_settings_come_back_as_they_were_saved(make_site: MakeSite):
    home, settings = make_site(release_scalars=("loss",), epsilon_cap=3.5)
    assert load_settings(home) == settings
    assert home.settings.stat().st_mode & 0o777 == 0o600


def test_every_field_is_written_out(make_site: MakeSite):
    home, _ = make_site()
    text = home.settings.read_text()
    assert all(f"\n{name} = " in text or f"[policy.{name}]" in text for name in SitePolicy.model_fields)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("epsilon_cap = ", "epsilon_kap = ", "epsilon_kap"),
        ('unit = "image"', 'unit = "hospital"', "hospital"),
        ("delta = 1e-05", "delta = 2.0", "delta"),
        ("tasks = [", "tasks = [\n", "not valid TOML|tasks"),
        ("schema_version = 1", "schema_version = 2", "schema_version"),
    ],
)
def test_wrong_settings_are_named(make_site: MakeSite, old: str, new: str, message: str):
    home, _ = make_site()
    text = home.settings.read_text()
    assert old in text
    write_private(home.settings, text.replace(old, new if "TOML" not in message else "tasks = [[").encode())
    with pytest.raises(InputError, match=message):
        load_settings(home)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o660])
def test_settings_that_others_can_read_or_change_are_refused(make_site: MakeSite, mode: int):
    home, _ = make_site()
    home.settings.chmod(mode)
    with pytest.raises(InputError, match="chmod 600"):
        load_settings(home)


def test_missing_settings_name_the_command(tmp_path: Path):
    with pytest.raises(InputError, match="join"):
        load_settings(Home(tmp_path))


def test_policy_denies_by_default():
    policy = SitePolicy()
    assert policy.tasks == ()
    assert policy.require_dp
    assert (policy.epsilon_cap, policy.max_steps_per_round, policy.max_rounds_per_day) == (0, 0, 0)
    assert policy.release_scalars == ()


def test_home_is_the_option_then_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MASKFED_CLIENT_HOME", str(tmp_path / "one"))
    assert find_home().path == tmp_path / "one"
    assert find_home(tmp_path / "two").path == tmp_path / "two"


def test_data_key_is_never_made_by_reading_it(tmp_path: Path):
    home = Home(tmp_path / "new")
    with pytest.raises(InputError, match=r"data.key is missing: put it back from the backup"):
        read_data_key(home)
    assert not home.data_key.exists()
    create_data_key(home)
    key = read_data_key(home)
    assert len(key) == 32
    assert read_data_key(home) == key
    assert home.data_key.stat().st_mode & 0o777 == 0o600
    write_private(home.data_key, key[:31])
    with pytest.raises(InputError, match="31 bytes, not 32"):
        read_data_key(home)


def test_private_files_restore_the_mask(tmp_path: Path):
    before = os.umask(0o022)
    try:
        with private_files():
            (tmp_path / "x").touch()
        (tmp_path / "y").touch()
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o077 == 0
    assert (tmp_path / "y").stat().st_mode & 0o044 != 0


def test_saving_replaces_in_one_step(make_site: MakeSite):
    home, settings = make_site()
    save_settings(home, settings.model_copy(update={"alias": "other"}))
    assert load_settings(home).alias == "other"
    assert [path.name for path in home.path.glob("*.toml*")] == ["site.toml"]
