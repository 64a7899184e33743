"""What is tried against a coordinator and its sites; each attack tells how many attempts were refused."""
# Longer than 250 lines: one function an attack, read side by side with the table of where each must leave a line.

import base64
import datetime as dt
import io
import json
import os
import socket
import ssl
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from flwr.proto.fleet_pb2 import ActivateNodeRequest

from benchmarks.coordinator import Coordinator
from client.entry import CodeRefusedError, check_bundle
from client.home import HOME_VARIABLE, Home
from client.policy.approval import approve
from client.records.chain import read_chain
from deploy.identity.certificates import create_authority
from deploy.identity.enrolment import BUNDLE_SCHEMA, PREFIX
from deploy.identity.keys import public_key_digest
from deploy.identity.request_key import read_request_certificate
from deploy.identity.site_certificates import create_door_authority, issue_site_certificate
from deploy.identity.site_identity import accept_certificate, create_identity
from deploy.identity.tls import client_context
from server.federation.fleet.code_bundle import build_bundle
from shared.storage.code_digest import installed_digest


def wrong_ca(coordinator: Coordinator) -> int:
    """A site that was given another CA does not talk to us."""
    create_authority(coordinator.root / "other.key", coordinator.root / "other.crt")
    context = client_context(coordinator.root / "other.crt")
    try:
        with socket.create_connection(("127.0.0.1", coordinator.port)) as raw:
            context.wrap_socket(raw, server_hostname="localhost")
    except ssl.SSLCertVerificationError:
        return 1
    return 0


def no_certificate(coordinator: Coordinator) -> int:
    """A stranger who trusts the right CA and asks for the page that everybody was once given."""
    return int(_is_shut_out(coordinator, None))


def foreign_certificate(coordinator: Coordinator) -> int:
    """A site of another federation, with a certificate of that one's door."""
    pki = coordinator.root / "elsewhere"
    pki.mkdir()
    create_door_authority(pki)
    home = coordinator.root / "foreigner"
    create_identity(home, "foreigner")
    accept_certificate(home, issue_site_certificate(pki, "foreigner", (home / "node.key.pub").read_text()))
    return int(_is_shut_out(coordinator, home / "node.key"))


def revoked_certificate(coordinator: Coordinator) -> int:
    """A site that was added and removed again."""
    key = coordinator.enrol("revoked")
    is_in = not _is_shut_out(coordinator, key)
    removed, _ = coordinator.call("maskfed-server", "sites", "remove", "revoked")
    time.sleep(2)
    return int(is_in and removed == 0 and _is_shut_out(coordinator, key))


def unregistered_key(coordinator: Coordinator) -> int:
    """A certified site that signs its calls with a key that nobody has added."""
    home = coordinator.root / "stranger"
    coordinator.call("maskfed-client", "enroll", "stranger", home=home)
    status = _activate(coordinator, home / "node.key", 0.0)
    return int(status == httpx.codes.UNAUTHORIZED)


def _is_shut_out(coordinator: Coordinator, identity: Path | None) -> bool:
    context = client_context(coordinator.ca, identity)
    try:
        httpx.get(f"https://localhost:{coordinator.port}/health", verify=context, trust_env=False)
    except httpx.TransportError:
        return True
    return False


def stale_calls(coordinator: Coordinator) -> int:
    """Calls of a registered node that were recorded and are sent again too late, or were signed in the future.

    The same call with the right time is let in, so it is the time that is refused.
    """
    key = coordinator.enrol("recorded")
    if _activate(coordinator, key, 0.0) != httpx.codes.OK:
        return 0
    late = [_activate(coordinator, key, seconds) for seconds in (-400.0, -86400.0, 60.0)]
    return len(late) if set(late) == {httpx.codes.UNAUTHORIZED} else 0


def replayed_enrolment(coordinator: Coordinator) -> int:
    """The line of a site that is in, or that was removed, is worth nothing."""
    line = _enrol(coordinator, "replay")
    again, said = coordinator.call("maskfed-server", "sites", "add", line, "--bundle", "again.json")
    coordinator.call("maskfed-server", "sites", "remove", "replay")
    after, _ = coordinator.call("maskfed-server", "sites", "add", line, "--bundle", "after.json")
    return 2 if (again, after) == (2, 2) and _is_one_line(said) else 0


def stolen_enrolment(coordinator: Coordinator) -> int:
    """A line whose alias was changed is not signed."""
    line = coordinator.request_of("honest")
    fields = json.loads(base64.urlsafe_b64decode(line.removeprefix(PREFIX)))
    forged = PREFIX + base64.urlsafe_b64encode(json.dumps(fields | {"alias": "thief"}).encode()).decode()
    code, said = coordinator.call("maskfed-server", "sites", "add", forged)
    return int(code == 2 and _is_one_line(said))


def foreign_join_bundle(coordinator: Coordinator) -> int:
    """A site does not join with the bundle of another key; the line is on its console."""
    home = coordinator.root / "first"
    coordinator.call("maskfed-client", "enroll", "first", home=home)
    _enrol(coordinator, "second")
    return _refused_joins(coordinator, home, [coordinator.root / "second.join.json"])


def path_in_a_join_bundle(coordinator: Coordinator) -> int:
    """An alias that climbs out of its folder is no alias."""
    home = coordinator.root / "climber"
    coordinator.call("maskfed-client", "enroll", "climber", home=home)
    bundles, request = [], read_request_certificate(coordinator.ca.parent / "request.pem")
    for number, alias in enumerate(("../../climber", "a/b", "..", "/etc/passwd", "a\x00b")):
        fields = {
            "schema": BUNDLE_SCHEMA,
            "alias": alias,
            "address": f"localhost:{coordinator.port}",
            "ca_certificate": coordinator.ca.read_text(),
            "site_certificate": (coordinator.insider.with_suffix(".crt")).read_text(),
            "request_certificate": request.public_bytes(Encoding.PEM).decode(),
            "code_digest": "0" * 64,
            "public_key_digest": public_key_digest((home / "node.key.pub").read_text()),
            "signing_key": (home / "site-sign.key.pub").read_text().strip(),
        }
        bundles.append(coordinator.root / f"climb{number}.json")
        bundles[-1].write_text(json.dumps(fields))
    return _refused_joins(coordinator, home, bundles)


def foreign_code(coordinator: Coordinator) -> int:
    """Flower bundles with one changed byte, with a module that would be imported, and with names that climb."""
    home = Home(coordinator.root / "victim")
    home.path.mkdir(mode=0o700)
    approve(home, "code", installed_digest())
    good = build_bundle()
    os.environ[HOME_VARIABLE] = str(home.path)
    check_bundle(good)
    changes = {"client/policy/rules.py": b"#", "opacus.py": b"", "client/../../x.py": b"", "/etc/cron.d/x": b""}
    refused = 0
    for name, data in changes.items():
        try:
            check_bundle(_with(good, name, data))
        except CodeRefusedError:
            refused += 1
    return refused if refused == len(changes) else 0


def oversized_body(coordinator: Coordinator) -> int:
    """Nine megabytes to a path that takes at most eight."""
    return int(coordinator.send(_head("/v1/fleet/push-object", 9437184)) == httpx.codes.REQUEST_ENTITY_TOO_LARGE)


def forged_control(coordinator: Coordinator) -> int:
    """The Control and Runtime API under every spelling that has worked somewhere."""
    paths = (
        "/v1/control/start-run",
        "/v1/runtime/acquire-task",
        "/v1/fleet/../control/start-run",
        "//v1/control/start-run",
    )
    answers = {coordinator.send(_head(path, 0)) for path in paths}
    return len(paths) if answers == {httpx.codes.NOT_FOUND} else 0


@dataclass(frozen=True)
class Attack:
    """`run` gives the number of refused attempts, 0 when one was let in; `lines` counts where each must leave one."""

    run: Callable[[Coordinator], int]
    lines: Callable[[Coordinator], int]


def _edge(coordinator: Coordinator) -> int:
    return len(coordinator.lines("edge.log"))


def _door(coordinator: Coordinator) -> int:
    return len(coordinator.lines("door.log"))


def _admissions(coordinator: Coordinator) -> int:
    return sum(' refused"' in line for line in coordinator.lines("admissions.log"))


def _console(coordinator: Coordinator) -> int:
    return sum(_is_one_line(said) for said in coordinator.said)


def _journal(coordinator: Coordinator) -> int:
    path = Home(coordinator.root / "victim").journal
    return sum(entry.kind == "refusal" for entry in read_chain(path)) if path.exists() else 0


ATTACKS = {
    "wrong CA": Attack(wrong_ca, _door),
    "no certificate": Attack(no_certificate, _door),
    "certificate of another door": Attack(foreign_certificate, _door),
    "revoked certificate": Attack(revoked_certificate, _door),
    "unregistered key": Attack(unregistered_key, _edge),
    "stale signed calls": Attack(stale_calls, _edge),
    "replayed enrolment": Attack(replayed_enrolment, _admissions),
    "stolen enrolment": Attack(stolen_enrolment, _admissions),
    "foreign join bundle": Attack(foreign_join_bundle, _console),
    "path in a join bundle": Attack(path_in_a_join_bundle, _console),
    "foreign code in a Flower bundle": Attack(foreign_code, _journal),
    "oversized body": Attack(oversized_body, _edge),
    "forged control calls": Attack(forged_control, _edge),
}


def _enrol(coordinator: Coordinator, alias: str) -> str:
    """Add a site; its enrolment line."""
    line = coordinator.request_of(alias)
    code, said = coordinator.call("maskfed-server", "sites", "add", line)
    if code:
        raise RuntimeError(said)
    return line


def _activate(coordinator: Coordinator, key_file: Path, seconds: float) -> int:
    """Status of an activation signed by a node key for a time that is `seconds` from now."""
    key = serialization.load_ssh_private_key(key_file.read_bytes(), password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    signed = (dt.datetime.now(dt.UTC) + dt.timedelta(seconds=seconds)).isoformat()
    headers = {
        "content-type": "application/protobuf",
        "flwr-public-key": base64.b64encode(public).decode(),
        "flwr-timestamp": signed,
        "flwr-signature": base64.b64encode(key.sign(signed.encode(), ec.ECDSA(hashes.SHA256()))).decode(),
    }
    body = ActivateNodeRequest(public_key=public, heartbeat_interval=30.0).SerializeToString()
    url = f"https://localhost:{coordinator.port}/v1/fleet/activate-node"
    verify = client_context(coordinator.ca, coordinator.insider)
    return httpx.post(url, content=body, headers=headers, verify=verify, trust_env=False).status_code


def _refused_joins(coordinator: Coordinator, home: Path, bundles: Sequence[Path]) -> int:
    images = coordinator.root / "images"
    images.mkdir(exist_ok=True)
    refused = 0
    for bundle in bundles:
        code, _ = coordinator.call(
            "maskfed-client", "join", str(bundle), "--data", str(images), "--image-size", "16", home=home
        )
        refused += code == 2 and not (home / "site.toml").exists() and not (home / "ca.crt").exists()
    return refused if refused == len(bundles) else 0


def _with(bundle: bytes, name: str, data: bytes) -> bytes:
    """A Flower bundle with `data` added to the end of one file, or as a new file."""
    with zipfile.ZipFile(io.BytesIO(bundle)) as archive:
        files = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    files[name] = files.get(name, b"") + data
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for each, content in files.items():
            archive.writestr(each, content)
    return buffer.getvalue()


def _head(path: str, num_bytes: int) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Connection: close", f"Content-Length: {num_bytes}", "", ""]
    return "\r\n".join(lines).encode()


def _is_one_line(said: str) -> bool:
    return said.startswith("error: ") and "\n" not in said
