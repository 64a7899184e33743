import pytest

from client.operator.status import summary
from shared.storage import room
from tests.client.conftest import MakeSite


def test_a_full_disk_is_told_before_everything_else(make_site: MakeSite, monkeypatch: pytest.MonkeyPatch):
    home, settings = make_site()
    usual = list(summary(home, settings))
    assert usual[0].startswith("data set ")
    monkeypatch.setattr(room, "has_room", lambda *_: False)
    first, *others = summary(home, settings)
    assert first.startswith(f"DISK: the disk of {home.path} is full")
    assert others == usual
