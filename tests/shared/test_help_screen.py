import os

import pytest

from shared.help_screen import load_help


@pytest.mark.parametrize("width", ["0", "5", "abc", "-40", "", "\u0664\u0660"])
def test_a_width_in_which_no_help_has_room_is_taken_out(monkeypatch: pytest.MonkeyPatch, width: str):
    for name in ("COLUMNS", "TERMINAL_WIDTH"):
        monkeypatch.setenv(name, width)
    load_help()
    assert not {"COLUMNS", "TERMINAL_WIDTH"} & os.environ.keys()


@pytest.mark.parametrize("width", ["20", "400"])
def test_any_other_width_stays(monkeypatch: pytest.MonkeyPatch, width: str):
    monkeypatch.setenv("COLUMNS", width)
    load_help()
    assert os.environ["COLUMNS"] == width
