import base64
import datetime as dt
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from deploy.errors import ProvisionError
from deploy.identity.enrolment import (
    PREFIX,
    check_alias,
    read_bundle,
    read_request,
    write_bundle,
)
from deploy.identity.keys import fingerprint, public_key_digest
from deploy.identity.site_certificates import issue_site_certificate
from deploy.identity.site_identity import accept_bundle, create_identity
from tests.signing import make_federation, public_of


@pytest.fixture
def line(tmp_path: Path) -> str:
    return create_identity(tmp_path / "site", "site-0")


@pytest.fixture
def pki(tmp_path: Path) -> Path:
    """The `pki` folder of a coordinator."""
    make_federation(tmp_path / "coordinator")
    return tmp_path / "coordinator" / "pki"


def tampered(line: str, **changes: str) -> str:
    fields = json.loads(base64.urlsafe_b64decode(line.removeprefix(PREFIX)))
    return PREFIX + base64.urlsafe_b64encode(json.dumps(fields | changes).encode()).decode()


def test_request_is_one_line_and_carries_the_public_key(line: str, tmp_path: Path):
    assert "\n" not in line
    request = read_request(f"  {line}\n")
    assert request.alias == "site-0"
    assert request.public_key == (tmp_path / "site" / "node.key.pub").read_text().strip()


def test_request_holds_no_private_byte(line: str, tmp_path: Path):
    decoded = base64.urlsafe_b64decode(line.removeprefix(PREFIX)).decode()
    private = (tmp_path / "site" / "node.key").read_text()
    body = "".join(private.splitlines()[1:-1])
    assert not any(body[start : start + 24] in decoded for start in range(len(body) // 2, len(body) - 24))
    assert (tmp_path / "site" / "site.secret").read_bytes() not in decoded.encode("latin-1", "replace")


@pytest.mark.parametrize(
    "changes",
    [
        {"alias": "site-1"},
        {"created": "2026-01-01T00:00:00+00:00"},
        {"signature": "AA=="},
        {"second_signature": "AA=="},
        {"signing_key": public_of("site-0")},
        {"signing_key": "é"},
    ],
)
def test_a_changed_field_breaks_the_signature(line: str, changes: dict[str, str]):
    with pytest.raises(ProvisionError, match="not valid"):
        read_request(tampered(line, **changes))


def test_a_key_cannot_be_enrolled_without_its_private_half(line: str, tmp_path: Path):
    create_identity(tmp_path / "other", "site-1")
    stolen = (tmp_path / "other" / "node.key.pub").read_text().strip()
    with pytest.raises(ProvisionError, match="not valid"):
        read_request(tampered(line, public_key=stolen))


@pytest.mark.parametrize("days", [-1, 15])
def test_requests_from_the_future_or_too_old_are_refused(line: str, days: int):
    with pytest.raises(ProvisionError, match="at most 14 days"):
        read_request(line, now=dt.datetime.now(dt.UTC) + dt.timedelta(days=days))


@pytest.mark.parametrize("text", ["", "hello", PREFIX, PREFIX + "####", PREFIX + base64.b64encode(b"[]").decode()])
def test_garbage_is_one_clear_line(text: str):
    with pytest.raises(ProvisionError) as caught:
        read_request(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("alias", ["", "../x", "a/b", "A", "-a", "a-", "a" * 33, "a\nb", "."])
def test_aliases_that_could_be_paths_are_refused(alias: str, tmp_path: Path):
    with pytest.raises(ProvisionError, match="alias"):
        check_alias(alias)
    with pytest.raises(ProvisionError):
        create_identity(tmp_path / "never", alias)
    assert not (tmp_path / "never").exists()


def test_enrolling_again_keeps_the_key(line: str, tmp_path: Path):
    key = (tmp_path / "site" / "node.key").read_bytes()
    again = create_identity(tmp_path / "site", "site-0")
    assert (tmp_path / "site" / "node.key").read_bytes() == key
    assert read_request(again).public_key == read_request(line).public_key


def test_bundle_round_trip_and_fingerprint(line: str, pki: Path, tmp_path: Path):
    request = read_request(line)
    written = write_bundle(tmp_path / "b.json", request, "fleet.example:443", pki, "0" * 64)
    assert read_bundle(tmp_path / "b.json") == written
    assert written.ca_fingerprint == fingerprint(pki / "ca.crt")
    accept_bundle(tmp_path / "site", written)
    accept_bundle(tmp_path / "site", written)
    assert (tmp_path / "site" / "ca.crt").read_text() == (pki / "ca.crt").read_text()
    assert (tmp_path / "site" / "node.crt").read_text() == written.site_certificate


def test_a_bundle_whose_certificate_is_for_another_key_leaves_nothing_behind(line: str, pki: Path, tmp_path: Path):
    other = read_request(create_identity(tmp_path / "other", "site-1"))
    bundle = write_bundle(tmp_path / "b.json", read_request(line), "fleet.example:443", pki, "0" * 64)
    foreign = issue_site_certificate(pki, "site-0", other.public_key)
    with pytest.raises(ProvisionError, match="another node key"):
        accept_bundle(tmp_path / "site", replace(bundle, site_certificate=foreign))
    assert not (tmp_path / "site" / "ca.crt").exists()
    assert not (tmp_path / "site" / "node.crt").exists()


def test_bundle_for_another_key_is_refused(line: str, pki: Path, tmp_path: Path):
    other = read_request(create_identity(tmp_path / "other", "site-1"))
    bundle = write_bundle(tmp_path / "b.json", other, "fleet.example:443", pki, "0" * 64)
    with pytest.raises(ProvisionError, match="another key"):
        accept_bundle(tmp_path / "site", bundle)
    assert not (tmp_path / "site" / "ca.crt").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"alias": "../../etc"},
        {"schema": 4},
        {"schema": 2},
        {"site_certificate": "no certificate"},
        {"extra": "x"},
        {"code_digest": "zz"},
        {"address": "nowhere"},
        {"ca_certificate": "no certificate"},
        {"alias": 3},
    ],
)
def test_foreign_bundles_are_refused(line: str, pki: Path, tmp_path: Path, changes: dict[str, object]):
    bundle = write_bundle(tmp_path / "b.json", read_request(line), "fleet.example:443", pki, "0" * 64)
    (tmp_path / "bad.json").write_text(json.dumps(asdict(bundle) | changes))
    with pytest.raises(ProvisionError) as caught:
        read_bundle(tmp_path / "bad.json")
    assert "\n" not in str(caught.value)


def test_key_digest_ignores_the_comment():
    assert public_key_digest("ecdsa AAAA me@host") == public_key_digest("ecdsa AAAA")
