import datetime as dt
import errno
import os
import shutil
import socket
import ssl
import subprocess
import threading
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from deploy.errors import ProvisionError
from deploy.identity import certificates, keys
from deploy.identity.tls import client_context


@pytest.fixture
def pki(tmp_path: Path) -> Path:
    certificates.create_authority(tmp_path / "ca" / "ca.key", tmp_path / "pki" / "ca.crt")
    issue(tmp_path, ["fleet.example", "10.1.2.3"])
    return tmp_path


def issue(root: Path, hosts: list[str], **settings: int) -> None:
    certificates.issue_server_certificate(
        ca_key=root / "ca" / "ca.key",
        ca_certificate=root / "pki" / "ca.crt",
        certificate=root / "pki" / "server.pem",
        key=root / "pki" / "server.key",
        hosts=hosts,
        **settings,
    )


def handshake(pki: Path, ca: Path, host: str) -> None:
    """One TLS connection to a server with the issued certificate, by Python's own ssl."""
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_context.load_cert_chain(pki / "pki" / "server.pem", pki / "pki" / "server.key")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            try:
                server_context.wrap_socket(connection, server_side=True).close()
            except (ssl.SSLError, OSError):
                connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            with socket.create_connection(listener.getsockname(), timeout=5) as raw:
                client_context(ca).wrap_socket(raw, server_hostname=host).close()
        finally:
            thread.join(5)


@pytest.mark.parametrize("host", ["fleet.example", "10.1.2.3", "localhost", "127.0.0.1"])
def test_certificate_is_accepted_for_every_host_it_was_made_for(pki: Path, host: str):
    handshake(pki, pki / "pki" / "ca.crt", host)


def test_certificate_is_refused_for_another_host(pki: Path):
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(pki, pki / "pki" / "ca.crt", "other.example")
    with pytest.raises(ProvisionError, match=r"'other.example' is not in .*renew"):
        keys.check_certificate(pki / "pki" / "server.pem", ["other.example"])


def test_a_wrong_ca_is_not_accepted(pki: Path, tmp_path: Path):
    certificates.create_authority(tmp_path / "other" / "ca.key", tmp_path / "other" / "ca.crt")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(pki, tmp_path / "other" / "ca.crt", "localhost")


def test_expired_and_not_yet_valid_certificates_are_named_with_their_cure(pki: Path):
    certificate, now = pki / "pki" / "server.pem", dt.datetime.now(dt.UTC)
    keys.check_certificate(certificate, [], now)
    with pytest.raises(ProvisionError, match=r"expired on \d{4}-.*maskfed-server renew"):
        keys.check_certificate(certificate, [], now + dt.timedelta(days=400))
    with pytest.raises(ProvisionError, match=r"valid from .*set the clock"):
        keys.check_certificate(certificate, [], now - dt.timedelta(hours=1))


def test_private_files_are_readable_by_their_owner_only_whatever_the_umask(pki: Path):
    for private in (pki / "ca" / "ca.key", pki / "pki" / "server.key"):
        assert private.stat().st_mode & 0o777 == 0o600
        keys.check_private(private)
    (pki / "pki" / "server.key").chmod(0o640)
    with pytest.raises(ProvisionError, match=r"mode 0640, at most 0600.*chmod 600"):
        keys.check_private(pki / "pki" / "server.key")


def test_nothing_is_overwritten(pki: Path):
    before = {path: path.read_bytes() for path in pki.rglob("*") if path.is_file()}
    with pytest.raises(ProvisionError, match="exists already"):
        certificates.create_authority(pki / "ca" / "ca.key", pki / "pki" / "ca.crt")
    with pytest.raises(ProvisionError, match="exists already"):
        issue(pki, [])
    with pytest.raises(ProvisionError, match="exists already"):
        keys.create_file(pki / "pki" / "ca.crt", b"x")
    assert {path: path.read_bytes() for path in pki.rglob("*") if path.is_file()} == before


def test_renewal_keeps_the_ca_and_replaces_key_and_certificate(pki: Path):
    old = {name: (pki / "pki" / name).read_bytes() for name in ("ca.crt", "server.pem", "server.key")}
    certificates.renew_server_certificate(
        ca_key=pki / "ca" / "ca.key",
        ca_certificate=pki / "pki" / "ca.crt",
        certificate=pki / "pki" / "server.pem",
        key=pki / "pki" / "server.key",
        hosts=["new.example"],
    )
    assert (pki / "pki" / "ca.crt").read_bytes() == old["ca.crt"]
    assert (pki / "pki" / "server.pem").read_bytes() != old["server.pem"]
    assert (pki / "pki" / "server.key").stat().st_mode & 0o777 == 0o600
    handshake(pki, pki / "pki" / "ca.crt", "new.example")


def test_the_ca_key_of_another_federation_signs_nothing(pki: Path, tmp_path: Path):
    certificates.create_authority(tmp_path / "other" / "ca.key", tmp_path / "other" / "ca.crt")
    with pytest.raises(ProvisionError, match="does not belong"):
        certificates.issue_server_certificate(
            ca_key=tmp_path / "other" / "ca.key",
            ca_certificate=pki / "pki" / "ca.crt",
            certificate=tmp_path / "x.pem",
            key=tmp_path / "x.key",
            hosts=[],
        )
    assert not (tmp_path / "x.pem").exists()


def test_node_key_is_p384_in_openssh_form(tmp_path: Path):
    public = keys.create_node_key(tmp_path / "node.key")
    key = serialization.load_ssh_private_key((tmp_path / "node.key").read_bytes(), password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert key.curve.name == "secp384r1"
    assert (tmp_path / "node.key.pub").read_text() == public + "\n"
    assert (tmp_path / "node.key").stat().st_mode & 0o777 == 0o600


def test_fingerprint_is_openssls(pki: Path):
    openssl = shutil.which("openssl")
    ours = keys.fingerprint(pki / "pki" / "ca.crt").replace(" ", "")
    certificate = x509.load_pem_x509_certificate((pki / "pki" / "ca.crt").read_bytes())
    from cryptography.hazmat.primitives import hashes

    assert ours == certificate.fingerprint(hashes.SHA256()).hex()
    if openssl:
        command = [openssl, "x509", "-noout", "-fingerprint", "-sha256", "-in", str(pki / "pki" / "ca.crt")]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert said.split("=")[1].strip().replace(":", "").lower() == ours


def test_local_tls_leaves_no_ca_key_behind(tmp_path: Path):
    certificates.create_local_tls(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ca.crt", "srv.key", "srv.pem"]
    assert 3600 < keys.days_left(tmp_path / "srv.pem") < 3651


def test_a_certificate_that_ends_soon_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    certificates.create_authority(tmp_path / "ca" / "ca.key", tmp_path / "pki" / "ca.crt")
    issue(tmp_path, [], days=20)
    keys.warn_of_expiry(tmp_path / "pki" / "ca.crt")
    assert caplog.messages == []
    keys.warn_of_expiry(tmp_path / "pki" / "server.pem")
    assert "only 20 days left" in caplog.text


def no_room(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_no_empty_file_and_says_which_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(ProvisionError, match=r"/a/secret: No space left on device; free some space there"):
        keys.create_secret(tmp_path / "a" / "secret")
    assert list((tmp_path / "a").iterdir()) == []


def test_a_file_that_is_replaced_on_a_full_disk_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "x").write_text("before")
    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(ProvisionError, match="No space left"):
        keys.replace_file(tmp_path / "x", b"after")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("x", "before")]
