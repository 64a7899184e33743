"""Which keys may sign requests: those that this federation's CA has certified for it, the newest only."""

import datetime as dt
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

import deploy.identity.request_key
import shared.messages.request_key
from deploy.identity.certificates import issue_server_certificate
from deploy.identity.keys import load_certificate
from server.federation.messaging.signed_grid import read_request_key
from shared.messages.request_key import check_certificate, serial_of
from shared.messages.signature import SignatureError, public_text
from tests.signing import make_federation, renew_request_key

NOW = dt.datetime.now(dt.UTC)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    make_federation(tmp_path / "coordinator")
    return tmp_path / "coordinator"


def request_certificate(home: Path) -> bytes:
    return read_request_key(home / "pki" / "request.pem")[1]


def authority(home: Path) -> bytes:
    return (home / "pki" / "ca.crt").read_bytes()


def test_a_certified_key_is_the_one_of_the_private_half(home):
    key, certificate = read_request_key(home / "pki" / "request.pem")
    assert check_certificate(certificate, authority(home)) == public_text(key)


def test_both_sides_mean_the_same_purpose():
    ours = deploy.identity.request_key.REQUEST_PURPOSE.dotted_string
    assert ours == shared.messages.request_key.REQUEST_PURPOSE


def test_a_key_of_another_federation_is_refused(home, tmp_path):
    make_federation(tmp_path / "other")
    with pytest.raises(SignatureError, match="not certified by this federation"):
        check_certificate(request_certificate(tmp_path / "other"), authority(home))


def test_certificates_of_this_ca_for_other_purposes_are_refused(home):
    server = home / "pki" / "server.pem"
    issue_server_certificate(
        ca_key=home / "ca" / "ca.key",
        ca_certificate=home / "pki" / "ca.crt",
        certificate=server,
        key=home / "pki" / "server.key",
        hosts=["fleet.example"],
    )
    for path in (server, home / "pki" / "ca.crt"):
        with pytest.raises(SignatureError, match=r"not one for requests|not certified"):
            check_certificate(load_certificate(path).public_bytes(Encoding.DER), authority(home))


@pytest.mark.parametrize("days", [-1, 400])
def test_a_key_is_good_while_its_certificate_is_valid(home, days):
    with pytest.raises(SignatureError, match="the clock here says"):
        check_certificate(request_certificate(home), authority(home), now=NOW + dt.timedelta(days=days))


def test_a_key_that_was_replaced_is_out(home):
    old = request_certificate(home)
    renew_request_key(home)
    new = request_certificate(home)
    assert serial_of(new) > serial_of(old)
    check_certificate(new, authority(home), newest=old)
    check_certificate(new, authority(home), newest=new)
    with pytest.raises(SignatureError, match="replaced by a newer one"):
        check_certificate(old, authority(home), newest=new)


def test_a_renewed_key_is_newer_even_when_the_clock_went_back(home, monkeypatch):
    old = request_certificate(home)
    monkeypatch.setattr(deploy.identity.request_key.time, "time_ns", lambda: 5)
    renew_request_key(home)
    assert serial_of(request_certificate(home)) == serial_of(old) + 1


@pytest.mark.parametrize(
    "change", [lambda der: b"", lambda der: b"x" * 3000, lambda der: der[:-1], lambda der: b"\x30"]
)
def test_what_is_no_certificate_is_refused(home, change):
    with pytest.raises(SignatureError):
        check_certificate(change(request_certificate(home)), authority(home))


def test_any_changed_byte_of_a_certificate_is_refused(home):
    der = request_certificate(home)
    for position in range(0, len(der), 7):
        changed = der[:position] + bytes([der[position] ^ 1]) + der[position + 1 :]
        with pytest.raises(SignatureError):
            check_certificate(changed, authority(home))


def test_key_and_certificate_are_one_private_file(home):
    path = home / "pki" / "request.pem"
    assert path.stat().st_mode & 0o777 == 0o600
    assert x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc > NOW + dt.timedelta(days=300)
    assert list(path.parent.glob("request.pem.*")) == []
