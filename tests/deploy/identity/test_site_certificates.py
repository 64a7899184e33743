"""Certificates for the door, checked by OpenSSL as nginx checks them: chain, purpose, revocations."""

import json
import socket
import ssl
import threading
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from deploy.errors import ProvisionError
from deploy.identity.certificates import create_authority, issue_server_certificate
from deploy.identity.keys import load_certificate
from deploy.identity.site_certificates import (
    check_door_authority,
    create_door_authority,
    days_left_by_key,
    install_site_certificate,
    issue_site_certificate,
    write_revocations,
)
from deploy.identity.site_identity import accept_certificate, create_identity
from deploy.identity.tls import client_context


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A door: the federation's CA with a server certificate, and the CA of its sites."""
    pki = tmp_path_factory.mktemp("pki")
    create_authority(pki / "ca.key", pki / "ca.crt")
    issue_server_certificate(
        ca_key=pki / "ca.key",
        ca_certificate=pki / "ca.crt",
        certificate=pki / "server.pem",
        key=pki / "server.key",
        hosts=[],
    )
    assert create_door_authority(pki)
    return pki


def make_site(pki: Path, home: Path, alias: str) -> str:
    """A site with a certificate; its public key."""
    create_identity(home, alias)
    public = (home / "node.key.pub").read_text()
    install_site_certificate(issue_site_certificate(pki, alias, public), public, home / "node.crt")
    return public


def is_let_in(pki: Path, context: ssl.SSLContext) -> bool:
    """Whether a listener with the door's files takes a client, and answers it."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(pki / "server.pem", pki / "server.key")
    server.verify_mode = ssl.CERT_REQUIRED
    server.load_verify_locations(pki / "door-ca.crt")
    server.load_verify_locations(pki / "door.crl")
    server.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_CHAIN
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            raw, _ = listener.accept()
            try:
                with server.wrap_socket(raw, server_side=True) as stream:
                    stream.sendall(b"in")
            except OSError:
                raw.close()

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            with (
                socket.create_connection(listener.getsockname()) as raw,
                context.wrap_socket(raw, server_hostname="localhost") as stream,
            ):
                return stream.recv(2) == b"in"
        except OSError:
            return False
        finally:
            thread.join()


def test_a_certified_site_is_let_in_and_a_stranger_is_not(pki: Path, tmp_path: Path):
    public = make_site(pki, tmp_path / "site", "site-0")
    write_revocations(pki, [public])
    assert is_let_in(pki, client_context(pki / "ca.crt", tmp_path / "site" / "node.key"))
    assert not is_let_in(pki, client_context(pki / "ca.crt"))


def test_a_certificate_of_another_door_does_not_open_this_one(pki: Path, tmp_path: Path):
    (tmp_path / "other").mkdir()
    create_door_authority(tmp_path / "other")
    make_site(tmp_path / "other", tmp_path / "site", "site-0")
    assert not is_let_in(pki, client_context(pki / "ca.crt", tmp_path / "site" / "node.key"))


def test_whoever_is_not_registered_any_more_is_revoked_and_the_others_stay(pki: Path, tmp_path: Path):
    stays, goes = (make_site(pki, tmp_path / alias, alias) for alias in ("stays", "goes"))
    write_revocations(pki, [stays, goes])
    assert is_let_in(pki, client_context(pki / "ca.crt", tmp_path / "goes" / "node.key"))
    assert write_revocations(pki, [stays])
    assert not write_revocations(pki, [f"{stays} a comment"])
    assert not is_let_in(pki, client_context(pki / "ca.crt", tmp_path / "goes" / "node.key"))
    assert is_let_in(pki, client_context(pki / "ca.crt", tmp_path / "stays" / "node.key"))


def test_a_renewed_certificate_leaves_the_one_before_valid_and_both_end_with_the_site(pki: Path, tmp_path: Path):
    public = make_site(pki, tmp_path / "site", "site-0")
    before = load_certificate(tmp_path / "site" / "node.crt")
    pem = issue_site_certificate(pki, "site-0", public, days=900)
    accept_certificate(tmp_path / "site", pem)
    after = load_certificate(tmp_path / "site" / "node.crt")
    assert after.serial_number != before.serial_number
    assert max(days_left_by_key(pki).values()) == pytest.approx(900, abs=1)
    write_revocations(pki, [])
    listed = {entry.serial_number for entry in x509.load_pem_x509_crl((pki / "door.crl").read_bytes())}
    assert {before.serial_number, after.serial_number} <= listed


def test_a_site_certificate_is_good_for_nothing_but_the_door(pki: Path, tmp_path: Path):
    make_site(pki, tmp_path / "site", "site-0")
    certificate = load_certificate(tmp_path / "site" / "node.crt")
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage)
    assert list(usage.value) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert usage.critical
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    # The CA that sites trust has not signed it: a site cannot pass for the coordinator.
    assert certificate.issuer != load_certificate(pki / "ca.crt").subject


def test_a_site_takes_only_a_certificate_over_its_own_key_that_lasts(pki: Path, tmp_path: Path):
    public = make_site(pki, tmp_path / "site", "site-0")
    other = make_site(pki, tmp_path / "other", "site-1")
    before = (tmp_path / "site" / "node.crt").read_bytes()
    offered = {
        "another node key": issue_site_certificate(pki, "site-0", other),
        "ended on": issue_site_certificate(pki, "site-0", public, days=0),
        "not a PEM certificate": "hello",
        "another node key: ask": (pki / "server.pem").read_text(),
    }
    for told, pem in offered.items():
        with pytest.raises(ProvisionError, match=told):
            accept_certificate(tmp_path / "site", pem)
    assert (tmp_path / "site" / "node.crt").read_bytes() == before


def test_a_certificate_without_its_key_is_one_line(pki: Path, tmp_path: Path):
    make_site(pki, tmp_path / "site", "site-0")
    make_site(pki, tmp_path / "other", "site-1")
    (tmp_path / "site" / "node.crt").write_bytes((tmp_path / "other" / "node.crt").read_bytes())
    with pytest.raises(ProvisionError, match=r"node.key.*node.crt"):
        client_context(pki / "ca.crt", tmp_path / "site" / "node.key")
    (tmp_path / "site" / "node.crt").unlink()
    with pytest.raises(ProvisionError, match=r"node.key.*node.crt"):
        client_context(pki / "ca.crt", tmp_path / "site" / "node.key")


def test_a_folder_without_the_doors_ca_names_the_command(tmp_path: Path):
    with pytest.raises(ProvisionError, match="sites certify"):
        check_door_authority(tmp_path)
    assert create_door_authority(tmp_path)
    assert not create_door_authority(tmp_path)
    (tmp_path / "door-ca.pem").chmod(0o644)
    with pytest.raises(ProvisionError, match="chmod 600"):
        check_door_authority(tmp_path)


@pytest.mark.parametrize("damaged", ["", "{", "[1]", '[{"serial": "zz"}]'])
def test_a_damaged_list_of_what_was_issued_stops_and_is_named(damaged: str, tmp_path: Path):
    create_door_authority(tmp_path)
    (tmp_path / "door-issued.json").write_text(damaged)
    with pytest.raises(ProvisionError, match=r"door-issued.json is damaged"):
        write_revocations(tmp_path, [])


def test_a_serial_is_on_disk_before_its_certificate_is_given_out(pki: Path, tmp_path: Path):
    pem = issue_site_certificate(pki, "site-0", make_site(pki, tmp_path / "site", "site-0"))
    serials = [entry["serial"] for entry in json.loads((pki / "door-issued.json").read_text())]
    assert f"{load_certificate(pem.encode()).serial_number:x}" in serials
