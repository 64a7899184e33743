import datetime as dt
import json
import os
import time
from pathlib import Path

import httpx
import pytest

from deploy.checks import clock
from deploy.checks.clock import check_clock, check_own_clock, refused_clocks, warn_of_free_clock
from deploy.checks.dial import Way
from deploy.errors import ProvisionError


@pytest.mark.parametrize(("ahead", "says"), [(6.0, "6 s ahead of"), (-130.0, "130 s behind"), (400.0, "400 s ahead")])
def test_a_clock_over_the_limit_is_refused_with_the_cure(ahead: float, says: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(clock, "seconds_ahead", lambda *_: ahead)
    with pytest.raises(ProvisionError, match=rf"{says} .*fleet.example:443.* timedatectl set-ntp") as refused:
        check_clock(Way("fleet.example:443"), Path("ca.crt"), Path("node.key"))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("ahead", [3.9, 0.0, -119.0])
def test_a_clock_that_calls_can_be_signed_with_is_told(ahead: float, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(clock, "seconds_ahead", lambda *_: ahead)
    assert check_clock(Way("fleet.example:443"), Path("ca.crt"), Path("node.key")) == ahead


def test_the_limits_lie_within_those_of_flower():
    """A call whose time is further off is refused with 401, and the SuperNode then ends with code 0."""
    from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE

    assert clock.LARGEST_AHEAD_SECONDS < SYSTEM_TIME_TOLERANCE
    assert clock.LARGEST_BEHIND_SECONDS < SYSTEM_TIME_TOLERANCE + TIMESTAMP_TOLERANCE


def test_a_door_that_does_not_answer_is_no_reason_not_to_start(monkeypatch: pytest.MonkeyPatch):
    def unreachable(*_: object) -> float:
        raise httpx.ConnectError("no route")

    monkeypatch.setattr(clock, "seconds_ahead", unreachable)
    assert check_clock(Way("fleet.example:443"), Path("ca.crt"), Path("node.key")) is None


def test_a_clock_before_the_hosts_own_files_stops_the_start(tmp_path: Path):
    written = tmp_path / "sites.json"
    written.write_text("{}")
    os.utime(written, (time.time() + 3600, time.time() + 3600))
    with pytest.raises(ProvisionError, match=r"the clock says .* but .*sites.json was written at .*set-ntp"):
        check_own_clock([tmp_path / "missing", written])
    check_own_clock([written], now=dt.datetime.now(dt.UTC) + dt.timedelta(hours=2))


def test_a_clock_that_nothing_sets_is_a_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setattr(clock, "is_synchronised", lambda: False)
    warn_of_free_clock()
    assert "not synchronised" in caplog.text
    caplog.clear()
    monkeypatch.setattr(clock, "is_synchronised", lambda: True)
    warn_of_free_clock()
    assert caplog.text == ""


def entry(address: str, status: int, ahead: float) -> str:
    now = dt.datetime(2026, 11, 23, 12, tzinfo=dt.UTC)
    signed = (now + dt.timedelta(seconds=ahead)).isoformat()
    return json.dumps({"time": now.isoformat(), "from": address, "status": status, "signed": signed})


def test_calls_refused_for_their_time_are_found_in_the_doors_log(tmp_path: Path):
    log = tmp_path / "edge.log"
    assert refused_clocks(log) == {}
    lines = [
        entry("10.0.0.1", 401, 600),
        entry("10.0.0.2", 401, 0),  # a key that is not registered
        entry("10.0.0.3", 404, 600),  # not a signed call
        entry("10.0.0.4", 401, 600),
        entry("10.0.0.4", 401, 1),  # its clock has been set since
        '{"time": "torn',
        json.dumps({"time": "2026-11-23T12:00:00+00:00", "from": "10.0.0.5", "status": 401, "signed": ""}),
        json.dumps({"time": "2026-11-23T12:00:00+00:00", "from": "10.0.0.6", "status": 401, "signed": "2026-11-23"}),
    ]
    log.write_text("\n".join(lines))
    assert refused_clocks(log) == {"10.0.0.1": 600.0}
