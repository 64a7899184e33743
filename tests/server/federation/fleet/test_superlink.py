import io
import subprocess
import sys
import tomllib
import zipfile

import flwr
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from server.federation.fleet import code_bundle as bundles
from server.federation.fleet.code_bundle import BundleError, build_bundle
from server.federation.fleet.superlink import (
    FLWR_VERSION,
    Control,
    node_key,
    superlink_address,
    wait_ready,
)
from server.federation.fleet.superlink_types import ControlError
from shared.storage.code_digest import files_digest, installed_digest

# Flower's own bundle builder uses a name that its pathspec deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")


def test_the_internals_are_those_of_the_pinned_flower():
    assert flwr.__version__ == FLWR_VERSION


def test_the_bundle_is_deterministic_and_holds_code_only():
    bundle = build_bundle()
    assert bundle == build_bundle()
    names = zipfile.ZipFile(io.BytesIO(bundle)).namelist()
    assert {"pyproject.toml", "server/app.py", "client/app.py", "shared/messages/training.py"} <= set(names)
    assert [name for name in names if not name.endswith(".py")] == ["pyproject.toml", ".info/CONTENT"]


def test_the_bundles_code_has_the_digest_that_sites_compare():
    archive = zipfile.ZipFile(io.BytesIO(build_bundle()))
    files = {name: archive.read(name) for name in archive.namelist() if name.startswith(("client/", "shared/"))}
    assert files_digest(files) == installed_digest()


def test_a_file_that_flower_drops_from_the_bundle_is_named(monkeypatch: pytest.MonkeyPatch):
    build = bundles.build_fab_from_files

    def drop_one(files: dict[str, bytes]) -> tuple[bytes, str]:
        return build({name: data for name, data in files.items() if name != "shared/errors.py"})

    monkeypatch.setattr(bundles, "build_fab_from_files", drop_one)
    with pytest.raises(BundleError, match=r"leaves out shared/errors\.py"):
        build_bundle()


def test_the_run_config_has_the_two_keys_only():
    project = tomllib.loads(zipfile.ZipFile(io.BytesIO(build_bundle())).read("pyproject.toml").decode())
    assert set(project["tool"]["flwr"]["app"]["config"]) == {"experiment", "run"}


def test_the_serverapp_never_imports_torch_nor_flower_internals_of_control():
    code = "import sys, server.app; print('torch' in sys.modules, 'server.federation.fleet.superlink' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_a_node_key_is_the_public_key_in_pem():
    public = ec.generate_private_key(ec.SECP384R1()).public_key()
    text = public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    assert node_key(text) == public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def test_a_superlink_that_is_not_there_is_one_clear_line():
    with pytest.raises(ControlError, match="does not answer"):
        wait_ready("127.0.0.1:1", None, 0.3)
    with Control("127.0.0.1:1", None, b"secret") as control, pytest.raises(ControlError, match="cannot be reached"):
        control.nodes()


def test_the_address_is_loopback_whatever_the_public_one_is(tmp_path):
    (tmp_path / "coordinator.toml").write_text('address = "fleet.example:443"\nport = 8500\n')
    assert superlink_address(tmp_path) == "127.0.0.1:8500"
