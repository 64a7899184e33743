"""The units are checked by systemd's own tools, with the paths of this checkout in place of /opt/maskfed."""

import getpass
import re
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.checks.dial import Way
from deploy.doctor import site_checks
from deploy.identity.certificates import create_authority
from deploy.identity.site_identity import create_identity
from deploy.processes import memory_limits
from deploy.processes.memory_limits import unit_bytes
from tests.needs import need_binary

UNITS = Path(__file__).parents[2] / "deploy" / "systemd"
NAMES = sorted(path.name for path in UNITS.glob("*.service"))
LARGEST_EXPOSURE = 25  # tenths; systemd calls up to 4.0 OK, unhardened services stand at 9.6


@pytest.fixture
def units(tmp_path: Path) -> Path:
    programs = str(Path(sys.executable).parent)
    for name in NAMES:
        text = (UNITS / name).read_text().replace("/opt/maskfed/.venv/bin", programs)
        (tmp_path / name).write_text(re.sub(r"^Documentation=.*\n", "", text, flags=re.MULTILINE))
    return tmp_path


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([need_binary("systemd-analyze"), *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", NAMES)
def test_unit_is_accepted_by_systemd(units: Path, name: str):
    checked = analyze("verify", "--man=no", str(units / name))
    complaints = [line for line in checked.stderr.splitlines() if "maskfed" in line]
    assert complaints == []


@pytest.mark.parametrize("name", NAMES)
def test_unit_is_hardened_by_systemds_own_measure(units: Path, name: str):
    offline = ["--offline=true", "--no-pager", f"--threshold={LARGEST_EXPOSURE}"]
    measured = analyze("security", *offline, str(units / name))
    assert measured.returncode == 0, measured.stdout.splitlines()[-1:]


@pytest.mark.parametrize("name", NAMES)
def test_unit_restarts_always(name: str):
    text = (UNITS / name).read_text()
    assert "\nRestart=always\n" in text
    assert "\nRestartSec=5\n" in text


def test_the_half_with_the_images_has_no_network_and_not_the_key():
    text = (UNITS / "maskfed-site.service").read_text()
    assert "IPAddressDeny=any\nIPAddressAllow=localhost\n" in text
    assert "InaccessiblePaths=-/var/lib/maskfed-node" in text


def test_the_sites_of_a_machine_share_one_registry():
    text = (UNITS / "maskfed-site.service").read_text()
    assert "\nEnvironment=MASKFED_REGISTRY=/var/lib/maskfed-registry\n" in text
    assert "\nReadWritePaths=/var/lib/maskfed-registry\n" in text
    assert "\nSupplementaryGroups=maskfed\n" in text


def test_the_half_with_the_key_does_not_see_the_images():
    text = (UNITS / "maskfed-node.service").read_text()
    assert "InaccessiblePaths=-/var/lib/maskfed-site" in text
    assert "User=maskfed-node" in text


def test_the_half_with_the_key_may_take_what_the_largest_model_of_a_policy_needs():
    text = (UNITS / "maskfed-node.service").read_text()
    gib = -(-unit_bytes(memory_limits.UNITS["maskfed-node"], memory_limits.DEFAULT_PARAMETERS) // 2**30)
    assert f"\nMemoryMax={gib}G\n" in text


@pytest.mark.parametrize("name", ["maskfed-server", "maskfed-site", "maskfed-node"])
def test_limits_for_a_model_are_settings_that_systemd_takes(units: Path, name: str):
    assert memory_limits.main(["233e6", "--units", str(units)]) == 0
    written = (units / f"{name}.service.d" / "memory.conf").read_text()
    assert f"MemoryMax={-(-unit_bytes(memory_limits.UNITS[name], 233e6) // 2**20)}M\n" in written
    assert "Environment=MASKFED_PARAMETERS=233000000\n" in written
    checked = analyze("verify", "--man=no", str(units / f"{name}.service"))
    assert [line for line in checked.stderr.splitlines() if "maskfed" in line or "memory.conf" in line] == []


@pytest.mark.parametrize("name", ["maskfed-server", "maskfed-site", "maskfed-node"])
def test_a_process_that_outgrows_its_unit_is_ended_alone(name: str):
    text = (UNITS / f"{name}.service").read_text()
    assert re.search(r"^MemoryMax=\d+[%G]$", text, re.MULTILINE)
    assert "\nMemorySwapMax=0\nOOMPolicy=continue\n" in text


def test_both_halves_of_a_site_start_through_their_guards_and_ask_no_path():
    python = "/opt/maskfed/.venv/bin/python -I -m"
    for name, entry in (
        ("maskfed-site", "deploy.guards.superexec client.entry"),
        ("maskfed-node", "deploy.guards.supernode"),
    ):
        text = (UNITS / f"{name}.service").read_text().replace("\\\n ", "")
        assert re.search(rf"^ExecStart=.*{python} +{entry} ", text, re.MULTILINE)
        assert "Environment=PATH" not in text


def test_splitting_a_site_moves_the_key_and_keeps_the_modes(tmp_path: Path):
    site, node, me = tmp_path / "site", tmp_path / "node", getpass.getuser()
    create_identity(site, "site-0")
    create_authority(tmp_path / "ca.key", site / "ca.crt")
    (site / "node.crt").write_text("certificate")
    (site / "site.toml").write_text(
        'alias = "site-0"\naddress = "[2001:db8::7]:443"\nproxy = "http://proxy.example:3128"\n'
    )
    key = (site / "node.key").read_bytes()
    command = [str(UNITS / "split-site"), str(site), str(node), me, me]
    subprocess.run(command, check=True, capture_output=True)
    assert (node / "node.key").read_bytes() == key
    assert not (site / "node.key").exists()
    assert (site / "site-sign.key").stat().st_mode & 0o777 == 0o600
    assert not list(node.glob("site-sign*"))
    assert (node / "address.env").read_text() == (
        "MASKFED_ADDRESS=[2001:db8::7]:443\nMASKFED_PROXY=http://proxy.example:3128\n"
    )
    assert (node / "node.crt").read_text() == "certificate"
    for private in (node / "node.key", node / "site.secret", node / "tls" / "srv.key", site / "site.secret"):
        assert private.stat().st_mode & 0o077 == 0, private
    found = {finding.name: finding for finding in site_checks(site, Way("fleet.example"))}
    assert "another user" in found["users"].text
    assert "node.key" not in found
    again = subprocess.run(command, check=False, capture_output=True, text=True)
    assert again.returncode == 2
    assert again.stderr.startswith("error: ")
