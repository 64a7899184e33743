import datetime as dt
from pathlib import Path

import pytest

from deploy.alerts.expiry import COORDINATORS, SITES, certificate_gauges, certificates_left, ending
from deploy.identity.certificates import create_authority


def test_thirty_days_and_the_end_are_told_once_each():
    def told(days: float) -> list[tuple[str, str, str]]:
        return list(ending({"server certificate": days}))

    assert told(31) == [] and told(30.5) == []
    (kind, key, text), *others = told(29.0)
    assert (kind, others) == ("certificate", []) and "ends within 30 days" in text
    assert f"{dt.datetime.now(dt.UTC) + dt.timedelta(days=29):%Y-%m}" in key
    assert told(29.0) == told(29.0) and told(29.0)[0][1] != told(12.0)[0][1] != told(-1.0)[0][1]
    assert "has ended" in told(-0.1)[0][2]


def test_days_are_those_of_the_files_that_are_there(tmp_path: Path):
    create_authority(tmp_path / "ca.key", tmp_path / "pki" / "ca.crt")
    (tmp_path / "ca.crt").write_text("damaged")
    left = certificates_left(tmp_path, COORDINATORS)
    assert left.keys() == {"CA certificate"} and left["CA certificate"] > 300
    assert certificates_left(tmp_path, SITES) == {}
    (name, kind, _, labels, value), *others = certificate_gauges(left)
    assert (name, kind, labels, others) == ("maskfed_certificate_days", "gauge", {"certificate": "CA certificate"}, [])
    assert value == pytest.approx(left["CA certificate"])
