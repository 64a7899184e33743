"""Paths from environments: an empty one names nothing, and a relative one is not another folder for each command."""

import os
import pwd
from pathlib import Path

import pytest

from client.home import find_home
from client.records.data_registry import REGISTRY_VARIABLE, registry_folder
from shared.data.image_cache import default_cache_home, open_images
from shared.errors import InputError
from shared.paths import path_variable, user_folder


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv(REGISTRY_VARIABLE, raising=False)
    return tmp_path


@pytest.mark.parametrize("named", ["", "relative/folder", "."])
def test_relative_folder_of_the_environment_is_ignored(own_folder: Path, monkeypatch: pytest.MonkeyPatch, named: str):
    monkeypatch.setenv("XDG_STATE_HOME", named)
    assert user_folder("XDG_STATE_HOME", ".local", "state") == own_folder / ".local" / "state"
    assert registry_folder().is_absolute()


def test_absolute_folder_of_the_environment_is_taken(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert user_folder("XDG_CACHE_HOME", ".cache") == Path("/cache")


def test_empty_variable_is_not_the_current_folder(own_folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(own_folder)
    monkeypatch.setenv("MASKFED_CLIENT_HOME", " ")
    assert find_home().path == own_folder / "site"
    monkeypatch.setenv("MASKFED_CACHE", "")
    assert default_cache_home() == own_folder / ".cache" / "maskfed"
    assert path_variable("MASKFED_NEVER_SET") == ""


def test_users_folder_is_put_into_a_variable(own_folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MASKFED_CACHE", "~/faces")
    assert default_cache_home() == own_folder / "faces"


def test_images_without_a_path_are_refused():
    with pytest.raises(InputError, match="an empty path was given"):
        open_images("", 16)


def test_a_relative_home_is_not_another_folder_wherever_a_command_runs(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "here")
    assert user_folder("XDG_CACHE_HOME", ".cache") == Path(pwd.getpwuid(os.getuid()).pw_dir) / ".cache"
