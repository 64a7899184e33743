"""What our own processes send with each call, and that loopback calls never look at proxy variables."""

import ast
import hashlib
import hmac
from pathlib import Path

import httpx
import pytest
from flwr.supercore.protobuf.client import ProtobufClient

from deploy.errors import ProvisionError
from deploy.guards import FLWR_VERSION
from deploy.guards.calls import HEADER, caller_value, send_with_every_call
from deploy.identity.keys import create_secret
from server import entry
from server.federation.fleet import superlink

ROOT = Path(__file__).resolve().parents[3]
SERVED = [ROOT / package for package in ("client", "deploy", "server", "shared")]


def test_flower_is_the_version_this_was_written_for():
    import flwr

    assert flwr.__version__ == FLWR_VERSION == superlink.FLWR_VERSION == entry.FLWR_VERSION


def test_the_coordinators_commands_show_what_the_guard_expects(tmp_path: Path):
    create_secret(tmp_path / "secret")
    secret = (tmp_path / "secret").read_bytes()
    expected = hmac.new(secret, b"maskfed calls of control and runtime paths", hashlib.sha256).hexdigest()
    assert caller_value(tmp_path / "secret") == superlink.caller_value(secret) == expected
    assert superlink.CALLER_HEADER == HEADER


def test_no_secret_no_call(tmp_path: Path):
    (tmp_path / "empty").touch()
    for file in (tmp_path / "empty", tmp_path / "missing"):
        with pytest.raises(ProvisionError, match=file.name):
            caller_value(file)


def test_every_client_of_flower_sends_the_value_and_asks_no_proxy(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ProtobufClient, "__init__", ProtobufClient.__init__)
    for name in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    send_with_every_call("value")
    client = ProtobufClient.from_server_address("127.0.0.1:1", True, None, [])
    assert client._client.headers[HEADER] == "value"
    assert not client._client.trust_env
    assert not client._client.follow_redirects
    assert all(mount is None for mount in client._client._mounts.values())
    client._client.close()


def test_commands_reach_the_superlink_whatever_the_proxy_variables_say(monkeypatch: pytest.MonkeyPatch):
    for name in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with superlink.Control("127.0.0.1:1", None, b"secret") as control:
        assert isinstance(control._http._client, httpx.Client)
        assert not control._http._client.trust_env


def test_no_call_in_the_packages_leaves_proxies_to_the_environment():
    """httpx asks the environment unless told not to, and so does gRPC; all our own calls go to known addresses."""
    found = 0
    for path in (path for folder in SERVED for path in folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if name in {"httpx.Client", "httpx.get", "httpx.post"}:
                assert "trust_env=False" in ast.unparse(node), path
                found += 1
            if name.endswith(("insecure_channel", "secure_channel")):
                assert "grpc.enable_http_proxy" in ast.unparse(node), path
                found += 1
    assert found >= 4
