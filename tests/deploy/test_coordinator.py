import errno
import os
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from deploy.coordinator import (
    Coordinator,
    create_coordinator,
    is_loopback,
    read_coordinator,
    renew_certificate,
    start_plan,
)
from deploy.errors import ProvisionError
from deploy.identity.keys import certificate_hosts, load_certificate
from deploy.processes.process import free_ports
from server.federation.fleet.metrics import coordinator_gauges
from tests.server.fake_federation import honest_sites, make_experiment, make_home, run_rounds
from tests.server.fake_grid import FakeGrid

ROOT = Path(__file__).parent.parent.parent

LOCAL = Coordinator(1, "127.0.0.1:8443", "127.0.0.1", 8443, 8190, edge=False, database=False)
PUBLIC = replace(LOCAL, address="fleet.example:443", edge=True)


def test_settings_survive_a_round_trip(tmp_path: Path):
    create_coordinator(tmp_path / "home", PUBLIC, ["10.0.0.7"])
    assert read_coordinator(tmp_path / "home") == PUBLIC
    named = certificate_hosts(load_certificate(tmp_path / "home" / "pki" / "server.pem"))
    assert set(named) == {"localhost", "127.0.0.1", "fleet.example", "10.0.0.7"}
    assert (tmp_path / "home").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (replace(PUBLIC, edge=False), "is public, but there is no edge"),
        (replace(LOCAL, host="0.0.0.0"), "listens on 127.0.0.1 only"),
        (replace(LOCAL, address="fleet.example"), "host:port"),
        (replace(LOCAL, address="localhost:9000"), "differ"),
        (replace(LOCAL, health_port=8443), "given twice"),
        (replace(LOCAL, port=0, address="localhost:1"), "1 to 65535"),
        (replace(LOCAL, schema=2), "schema 2"),
    ],
)
def test_settings_that_expose_or_contradict_are_refused_with_nothing_written(
    settings: Coordinator, line: str, tmp_path: Path
):
    with pytest.raises(ProvisionError, match=line):
        create_coordinator(tmp_path / "home", settings, [])
    assert not (tmp_path / "home").exists()


def test_a_bad_host_name_leaves_nothing_half_written(tmp_path: Path):
    with pytest.raises(ProvisionError, match="neither"):
        create_coordinator(tmp_path / "home", LOCAL, ["bad host\u00e9"])
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("stop_at", range(1, 12))
def test_init_is_all_or_nothing_on_a_full_disk_and_goes_on_after_a_kill(
    stop_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    home, tried, sync = tmp_path / "home", 0, os.fsync

    def limited(descriptor: int) -> None:
        nonlocal tried
        tried += 1
        if tried == stop_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", limited)
        with pytest.raises(ProvisionError, match=r"home/.*: No space left on device; free some space"):
            create_coordinator(home, LOCAL, [])
    assert not home.exists()
    # A kill cleans nothing up.
    monkeypatch.setattr("deploy.coordinator._remove_unfinished", lambda _: None)
    with monkeypatch.context() as patch:
        tried = 0
        patch.setattr(os, "fsync", limited)
        with pytest.raises(ProvisionError):
            create_coordinator(home, LOCAL, [])
    monkeypatch.undo()
    create_coordinator(home, LOCAL, [])
    assert read_coordinator(home) == LOCAL
    assert not list(home.glob("*unfinished*"))


def test_a_folder_in_use_is_left_alone(tmp_path: Path):
    create_coordinator(tmp_path / "home", LOCAL, [])
    before = {path: path.read_bytes() for path in (tmp_path / "home").rglob("*") if path.is_file()}
    with pytest.raises(ProvisionError, match="not empty"):
        create_coordinator(tmp_path / "home", LOCAL, [])
    assert {path: path.read_bytes() for path in (tmp_path / "home").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("port = 8443", "prot = 8443", "key 'port' is missing|key 'prot' is unknown"),
        ("port = 8443", 'port = "8443"', "is not of type int"),
        ("edge = true", "edge = false", "is public"),
        ("schema = 1", "schema = ", "not valid TOML"),
    ],
)
def test_edited_settings_are_checked_at_each_start(old: str, new: str, line: str, tmp_path: Path):
    create_coordinator(tmp_path / "home", PUBLIC, [])
    path = tmp_path / "home" / "coordinator.toml"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ProvisionError, match=line):
        read_coordinator(tmp_path / "home")


def test_an_address_outside_the_certificate_is_named_with_its_cure_and_renewing_cures_it(tmp_path: Path):
    home = tmp_path / "home"
    create_coordinator(home, PUBLIC, [])
    path = home / "coordinator.toml"
    path.write_text(path.read_text().replace("fleet.example", "new.example"))
    with pytest.raises(ProvisionError, match=r"'new.example' is not in .* renew --host new.example"):
        read_coordinator(home)
    assert "new.example" in renew_certificate(home, home / "ca" / "ca.key", [], days=30)
    assert read_coordinator(home).address == "new.example:443"


@pytest.mark.parametrize("name", ["superexec.secret", "pki/server.key", "ca/ca.key", "superlink.db"])
def test_a_private_file_that_others_can_read_stops_the_start(name: str, tmp_path: Path):
    create_coordinator(tmp_path / "home", LOCAL, [])
    (tmp_path / "home" / name).touch()
    (tmp_path / "home" / name).chmod(0o644)
    with pytest.raises(ProvisionError, match=rf"{name} has mode 0644.*chmod 600"):
        read_coordinator(tmp_path / "home")


def test_a_folder_that_others_can_enter_stops_the_start(tmp_path: Path):
    create_coordinator(tmp_path / "home", LOCAL, [])
    (tmp_path / "home").chmod(0o755)
    with pytest.raises(ProvisionError, match=r"mode 0755.*chmod 700"):
        read_coordinator(tmp_path / "home")


def test_a_clock_that_stands_before_the_certificate_stops_the_start(tmp_path: Path):
    create_coordinator(tmp_path / "home", LOCAL, [])
    later = time.time() + 3600
    os.utime(tmp_path / "home" / "pki" / "server.pem", (later, later))
    with pytest.raises(ProvisionError, match=r"the clock says .*server.pem was written at .*set-ntp"):
        start_plan(tmp_path / "home", LOCAL, lambda: None)


def test_an_edge_adds_nginx_last_and_a_database_its_flag(tmp_path: Path):
    from deploy.processes.process import free_ports
    from tests.needs import need_binary

    need_binary("nginx")
    port, superlink, health = free_ports(3)
    settings = Coordinator(1, f"localhost:{port}", "127.0.0.1", superlink, health, edge=True, database=True)
    create_coordinator(tmp_path / "home", settings, [])
    services = start_plan(tmp_path / "home", settings, lambda: None)
    assert [service.name for service in services] == ["superlink", "superexec", "edge"]
    flags = list(services[0].argv)
    assert flags[flags.index("--database") + 1] == str(tmp_path / "home" / "superlink.db")
    for safe in ("--enable-supernode-auth", "--disable-runtime-dependency-installation", "process"):
        assert safe in flags
    assert services[0].env["FLWR_TELEMETRY_ENABLED"] == "0"
    assert len({service.env["FLWR_HOME"] for service in services}) == 3


def test_loopback_is_recognised_in_every_spelling():
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost", "::ffff:127.0.0.1"))
    assert not any(is_loopback(host) for host in ("10.0.0.1", "0.0.0.0", "fleet.example", "::ffff:10.0.0.1"))


def test_a_ca_key_that_is_kept_elsewhere_is_asked_for(tmp_path: Path):
    create_coordinator(tmp_path / "home", LOCAL, [])
    with pytest.raises(ProvisionError, match=r"offline.key is not there: give --ca-key"):
        renew_certificate(tmp_path / "home", tmp_path / "offline.key", [], days=30)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(ProvisionError, match="give a folder that this user can write"):
        create_coordinator(tmp_path / "file" / "home", LOCAL, [])


OPENED: list[str] = []
"""Files that this process has opened; a hook cannot be taken off again."""
sys.addaudithook(lambda event, arguments: OPENED.append(str(arguments[0])) if event == "open" else None)


def test_no_running_process_of_the_coordinator_opens_the_ca_key(tmp_path: Path):
    """Only `init` and `renew` do, and a key that only lies there may be taken away at any time."""
    port, health = free_ports(2)
    home = tmp_path / "home"
    create_coordinator(home, replace(LOCAL, address=f"127.0.0.1:{port}", port=port, health_port=health), [])
    assert any(name.endswith("ca/ca.key") for name in OPENED)
    experiment = make_experiment(rounds=1)
    made = make_home(tmp_path / "work", experiment)
    shutil.copytree(home / "ca", made / "ca")
    OPENED.clear()
    start_plan(home, read_coordinator(home), lambda: None)
    run_rounds(made, FakeGrid(honest_sites()), experiment)
    list(coordinator_gauges(made))
    assert any(name.endswith("pki/request.pem") for name in OPENED)
    assert [name for name in OPENED if name.endswith("ca.key")] == []


def test_only_making_certificates_reads_the_ca_key():
    readers = {
        path.relative_to(ROOT).as_posix()
        for package in ("server", "client", "shared", "deploy")
        for path in (ROOT / package).rglob("*.py")
        if "load_authority(" in path.read_text(encoding="utf-8")
    }
    assert readers == {"deploy/identity/certificates.py", "deploy/identity/request_key.py"}
