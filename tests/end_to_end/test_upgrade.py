"""From a version without signed messages: its files, as it wrote them, and one command at each side."""

import base64
import datetime as dt
import json
import re
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from client.cli import main as client_cli
from client.home import Home
from client.settings import load_settings
from deploy.coordinator import Coordinator, create_coordinator, read_coordinator
from deploy.identity.enrolment import public_key_digest
from deploy.identity.keys import create_node_key
from deploy.processes.process import free_ports
from server.cli import main as server_cli
from server.federation.fleet.registry import Registry
from shared.messages.signature import public_text, read_key

SITE_TOML = """schema_version = 1
alias = "hospital-a"
address = "127.0.0.1:8443"
data = "/images"
identities = ""
image_size = 16
held_out_ratio = 0.1
head_file = "/head/head.json"
device = "cpu"
threads = 0

[policy]
tasks = ["train"]
experiments = "approved"
epsilon_cap = 8.0
"""


@pytest.fixture
def coordinator(tmp_path: Path) -> Path:
    """Folder of an older coordinator: no request key, sites with one key each."""
    home = tmp_path / "coordinator"
    port, health = free_ports(2)
    create_coordinator(home, Coordinator(1, f"127.0.0.1:{port}", "127.0.0.1", port, health, False, False), [])
    (home / "pki" / "request.pem").unlink()
    return home


@pytest.fixture
def site(tmp_path: Path, coordinator: Path) -> Path:
    """Folder of an older site, and its entry in the older `sites.json`."""
    home = tmp_path / "site"
    home.mkdir(mode=0o700)
    public = create_node_key(home / "node.key")
    (home / "tls").mkdir()
    for name, data in (("site.secret", bytes(32)), ("site.toml", SITE_TOML.encode()), ("data.key", bytes(range(32)))):
        (home / name).write_bytes(data)
        (home / name).chmod(0o600)
    (home / "ca.crt").write_bytes((coordinator / "pki" / "ca.crt").read_bytes())
    entry = {"alias": "hospital-a", "public_key": public, "node_id": 7, "added": "2026-01-02T03:04:05+00:00"}
    (coordinator / "sites.json").write_text(json.dumps({"sites": [entry | {"revoked": None}]}, indent=1))
    return home


def test_one_more_command_at_each_side_when_the_door_asked_for_no_certificates(server, client, coordinator, site):
    """As above, and a version whose door let in whoever had a key."""
    server("renew")
    server("sites", "renew", client("enroll", "hospital-a")[1].strip())
    for path in (coordinator / "pki").glob("door*"):
        path.unlink()
    settings = coordinator / "coordinator.toml"
    settings.write_text(re.sub(r"connections_per_address.*\n", "", settings.read_text()))
    code, _, err = server("sites", "list")
    assert (code, err.count("\n")) == (2, 1) and "maskfed-server sites certify" in err
    code, out, err = server("sites", "certify")
    assert code == 0, err
    assert "maskfed-client certificate hospital-a.certificate.pem" in out and "restart" in out
    code, _, err = client("start")
    assert code == 2 and "maskfed-client certificate FILE" in err
    code, out, _ = client("certificate", coordinator.parent / "hospital-a.certificate.pem")
    assert code == 0 and "restart" in out
    assert (site / "node.crt").read_bytes() == (coordinator.parent / "hospital-a.certificate.pem").read_bytes()
    assert "lasts 60 days and more" in server("sites", "certify")[1]
    assert "hospital-a.certificate.pem" in server("sites", "certify", "hospital-a")[1]
    assert server("sites", "certify", "nobody")[0] == 2


def old_line(home: Path) -> str:
    """As `enroll` printed it before lines had a signing key."""
    key = serialization.load_ssh_private_key((home / "node.key").read_bytes(), password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    fields = {
        "alias": "hospital-a",
        "public_key": (home / "node.key.pub").read_text().strip(),
        "created": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
    }
    signed = "\n".join(["maskfed-enrol-1:", *fields.values()]).encode()
    fields["signature"] = base64.b64encode(key.sign(signed, ec.ECDSA(hashes.SHA384()))).decode()
    return "maskfed-enrol-1:" + base64.urlsafe_b64encode(json.dumps(fields, sort_keys=True).encode()).decode()


def call(program, monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command."""
    monkeypatch.setattr(sys, "argv", ["maskfed", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        program.main()
        raise SystemExit(0)
    captured = capsys.readouterr()
    return int(caught.value.code or 0), captured.out, captured.err


@pytest.fixture
def server(monkeypatch, capsys, coordinator):
    monkeypatch.chdir(coordinator.parent)
    return lambda *arguments: call(server_cli, monkeypatch, capsys, *arguments, "--home", coordinator)


@pytest.fixture
def client(monkeypatch, capsys, site):
    return lambda *arguments: call(client_cli, monkeypatch, capsys, *arguments, "--home", site)


def test_one_command_at_each_side_takes_an_older_federation_over(server, client, coordinator, site):
    kept = {name: (site / name).read_bytes() for name in ("node.key", "site.toml", "data.key", "ca.crt", "site.secret")}
    code, _, err = server("sites", "list")
    assert (code, err.count("\n")) == (2, 1) and "maskfed-server renew --ca-key" in err
    code, _, err = server("renew")
    assert code == 0, err
    assert "sites renew" in server("sites", "list")[1]
    assert Registry(coordinator / "sites.json").active() == []
    code, line, _ = client("enroll", "hospital-a")
    assert code == 0
    code, out, _ = server("sites", "renew", line.strip())
    assert code == 0 and "new signing key" in out
    (renewed,) = Registry(coordinator / "sites.json").active()
    assert renewed.signing_key == public_text(read_key(site / "site-sign.key", "")) and renewed.signing_key in out
    assert (renewed.alias, renewed.node_id, renewed.added) == ("hospital-a", 7, "2026-01-02T03:04:05+00:00")
    assert {name: (site / name).read_bytes() for name in kept} == kept
    assert load_settings(Home(site)).policy.epsilon_cap == 8.0
    assert read_coordinator(coordinator).schema == 1


def test_what_an_older_site_brings_is_answered_with_one_line_that_says_what_to_do(server, client, coordinator, site):
    server("renew")
    for command in (("sites", "renew"), ("sites", "add")):
        code, _, err = server(*command, old_line(site))
        assert (code, err.count("\n")) == (2, 1)
        assert "maskfed-client enroll ALIAS" in err
    bundle = site.parent / "old.join.json"
    fields = {
        "schema": 1,
        "alias": "hospital-a",
        "address": "127.0.0.1:8443",
        "ca_certificate": (coordinator / "pki" / "ca.crt").read_text(),
        "code_digest": "0" * 64,
        "public_key_digest": public_key_digest((site / "node.key.pub").read_text()),
    }
    bundle.write_text(json.dumps(fields))
    code, _, err = client("join", bundle, "--data", site, "--image-size", "16")
    assert (code, err.count("\n")) == (2, 1)
    assert "maskfed-client enroll ALIAS" in err


@pytest.mark.parametrize("key", ["signing", "node"])
def test_either_key_is_renewed_or_made_again_and_the_other_vouches_for_it(server, client, coordinator, site, key):
    server("renew")
    server("sites", "renew", client("enroll", "hospital-a")[1].strip())
    registry, file = Registry(coordinator / "sites.json"), "site-sign.key" if key == "signing" else "node.key"
    stale = client("enroll", "hospital-a")[1].strip()
    before = registry.get("hospital-a")
    for is_lost in (False, True):
        old = (site / file).read_bytes()
        if is_lost:
            (site / file).unlink()
        line = client("enroll", "hospital-a", *([] if is_lost else ["--renew", key]))[1].strip()
        assert (site / file).read_bytes() != old and (site / file).stat().st_mode & 0o777 == 0o600
        assert f"new {key} key" in server("sites", "renew", line)[1]
        code, _, err = server("sites", "renew", stale)
        assert code == 2 and "in use before" in err
        assert server("sites", "renew", line)[0] == 2
    after = registry.get("hospital-a")
    assert len(after.former_keys) == 2
    assert (after.signing_key == before.signing_key) == (key == "node")
    assert (after.public_key == before.public_key) == (key == "signing")
    assert (after.node_id is None) == (key == "node")
    if key == "node":
        assert client("certificate", coordinator.parent / "hospital-a.certificate.pem")[0] == 0


def test_a_line_with_two_new_keys_takes_nobodys_place(server, coordinator, site, tmp_path, monkeypatch, capsys):
    server("renew")
    thief = tmp_path / "thief"
    line = call(client_cli, monkeypatch, capsys, "enroll", "hospital-a", "--home", thief)[1].strip()
    before = (coordinator / "sites.json").read_bytes()
    code, _, err = server("sites", "renew", line)
    assert code == 2 and "both keys are new" in err
    assert (coordinator / "sites.json").read_bytes() == before


def test_enroll_keeps_to_the_folders_site_and_says_where_the_node_key_is(client, site):
    code, _, err = client("enroll", "hospital-b")
    assert code == 2 and "hospital-a" in err
    assert not (site / "site-sign.key").exists()
    (site / "node.user").write_text("maskfed-node\n")
    (site.parent / "node").mkdir()
    (site / "node.key").rename(site.parent / "node" / "node.key")
    code, _, err = client("enroll", "hospital-a")
    assert code == 2 and "--node-key" in err
    code, line, _ = client("enroll", "hospital-a", "--node-key", site.parent / "node" / "node.key")
    assert code == 0 and line.startswith("maskfed-enrol-2:")
    assert not (site / "node.key").exists()
    assert client("enroll", "hospital-a", "--renew", "both")[0] == 2
