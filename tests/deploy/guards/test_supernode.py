"""The SuperNode's way to the coordinator: Flower's own client, with our certificate and proxy."""

import ssl
from pathlib import Path

import httpx
import pytest
from flwr.supercore.protobuf.client import ProtobufClient
from flwr.supernode.fleet_http_client import FleetHttpClient

from deploy.guards.supernode import main, show_certificate


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """What each of Flower's clients made its HTTP client with, ours last."""
    options: list[dict[str, object]] = []
    create = httpx.Client.__init__

    def note(self: httpx.Client, **given: object) -> None:
        options.append(given)
        create(self, **given)  # type: ignore[arg-type]

    monkeypatch.setattr(httpx.Client, "__init__", note)
    monkeypatch.setattr(ProtobufClient, "__init__", ProtobufClient.__init__)  # undone with the test
    return options


@pytest.mark.parametrize("proxy", ["", "http://127.0.0.1:3128"])
def test_flowers_fleet_client_shows_the_certificate_and_takes_the_sites_proxy_only(
    made: list[dict[str, object]], proxy: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    context = ssl.create_default_context()
    show_certificate(context, proxy)
    with FleetHttpClient.from_server_address("fleet.example:443", False, None, []):
        assert made[-1]["verify"] is context
        assert made[-1]["proxy"] == (proxy or None)
        assert made[-1]["trust_env"] is False
        assert made[-1]["follow_redirects"] is False


def test_a_supernode_without_its_certificate_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from deploy.identity.certificates import create_authority
    from deploy.identity.site_identity import create_identity

    create_identity(tmp_path / "site", "site-0")
    create_authority(tmp_path / "ca.key", tmp_path / "ca.crt")
    options = {
        "--superexec-auth-secret-file": tmp_path / "site" / "site.secret",
        "--root-certificates": tmp_path / "ca.crt",
        "--auth-supernode-private-key": tmp_path / "site" / "node.key",
    }
    monkeypatch.setattr("sys.argv", ["supernode", *(str(part) for pair in options.items() for part in pair)])
    with pytest.raises(SystemExit, match=r"does not start: .*node.crt"):
        main()
