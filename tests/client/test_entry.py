"""The process that Flower starts: pinned internals, own code only, nothing private in errors."""

import io
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from client import entry
from client.home import Home
from client.policy.approval import Approved, approve
from client.records.chain import read_chain
from server.federation.fleet.code_bundle import build_bundle
from shared.storage.code_digest import files_digest, installed_digest, site_files

# Flower's bundler calls pathspec by a name that is deprecated there.
pytestmark = pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")
ROOT = Path(__file__).parent.parent.parent


def rezip(content: bytes, **changed: bytes | None) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        files = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    for name, data in changed.items():
        if data is None:
            del files[name]
        else:
            files[name] = data
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def bundle() -> bytes:
    return build_bundle()


@pytest.fixture
def own_code() -> Approved:
    return Approved(code=frozenset({installed_digest()}))


def test_flower_is_the_version_this_was_written_for():
    assert metadata.version("flwr") == entry.FLWR_VERSION


def test_every_guarded_part_of_flower_still_exists():
    runtime = entry.runtime
    for name in ("register_signal_handlers", "install_from_fab", "get_load_client_app_fn", "push_task_output", "Error"):
        assert name in vars(runtime)


def test_bundle_of_the_same_code_passes(bundle: bytes, own_code: Approved):
    assert entry.bundle_problem(bundle, own_code) is None


def test_changed_client_code_is_refused(bundle: bytes, own_code: Approved):
    problem = entry.bundle_problem(
        rezip(bundle, **{"client/policy/rules.py": b"def review(*_): return None\n"}), own_code
    )
    assert problem is not None
    assert "not approved" in problem


def test_missing_client_file_is_refused(bundle: bytes, own_code: Approved):
    assert entry.bundle_problem(rezip(bundle, **{"shared/errors.py": None}), own_code) is not None


def test_changed_server_code_needs_no_approval(bundle: bytes, own_code: Approved):
    assert entry.bundle_problem(rezip(bundle, **{"server/app.py": b"x = 1\n"}), own_code) is None


def test_code_that_no_site_runs_is_not_even_unpacked(
    bundle: bytes, own_code: Approved, monkeypatch: pytest.MonkeyPatch
):
    unpacked: list[str] = []
    read = zipfile.ZipFile.read
    monkeypatch.setattr(
        zipfile.ZipFile, "read", lambda self, each: (unpacked.append(each.filename), read(self, each))[1]
    )
    assert entry.bundle_problem(bundle, own_code) is None
    assert {name.split("/")[0] for name in unpacked} == {"client", "shared"}


@pytest.mark.parametrize(
    "name", ["torch.py", "numpy/__init__.py", "client/../torch.py", "/etc/x.py", "sitecustomize.py"]
)
def test_anything_else_importable_is_refused(bundle: bytes, own_code: Approved, name: str):
    assert "which no bundle needs" in str(entry.bundle_problem(rezip(bundle, **{name: b""}), own_code))


@pytest.mark.parametrize("content", [b"", b"PK", b"x" * 1000])
def test_what_is_no_bundle_is_refused(content: bytes, own_code: Approved):
    assert "cannot be read" in str(entry.bundle_problem(content, own_code))


def test_bundle_that_unpacks_to_too_much_is_refused(own_code: Approved, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(entry, "LARGEST_BUNDLE_BYTES", 1000)
    assert entry.bundle_problem(rezip(build_bundle()), own_code) is not None


def test_installed_code_that_is_not_approved_is_refused(bundle: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MASKFED_CLIENT_HOME", str(tmp_path))
    home = Home(tmp_path)
    with pytest.raises(entry.CodeRefusedError):
        entry.check_bundle(bundle)
    assert read_chain(home.journal)[-1].fields["code"] == "code_not_approved"
    approve(home, "code", installed_digest())
    entry.check_bundle(bundle)


def test_code_that_was_loaded_before_its_approval_was_withdrawn_or_files_changed_is_refused(
    bundle: bytes, own_code: Approved, monkeypatch: pytest.MonkeyPatch
):
    """A forked process runs what its parent loaded, which may be older than the files: both must be approved."""
    assert entry.installed_problem(own_code) is None
    monkeypatch.setattr(entry, "LOADED", "0" * 64)
    problem = entry.installed_problem(own_code)
    assert problem is not None
    assert "client code that runs has digest 0000" in problem


def test_the_superexec_says_where_the_supernode_is_and_who_ends_with_a_torn_reply():
    told = ["--runtime-api-address", "127.0.0.1:9", "--root-certificates", "ca.crt", "--parent-pid", "7"]
    options = entry.read_options([*told, "--token", "secret"])
    assert (options.runtime_api_address, options.root_certificates) == ("127.0.0.1:9", "ca.crt")
    assert (options.parent_pid, options.insecure, options.token) == (7, False, "secret")
    with pytest.raises(SystemExit):
        entry.read_options(told)


def test_digest_covers_every_module_of_client_and_shared():
    names = set(site_files(ROOT))
    assert {"client/entry.py", "client/app.py", "shared/messages/training.py", "shared/storage/code_digest.py"} <= names
    files = site_files(ROOT)
    assert files_digest(files | {"client/app.py": b""}) != files_digest(files)
    assert files_digest({}) != files_digest({"client/x.py": b""})


def test_errors_that_leave_the_site_carry_no_text_of_exceptions():
    error = entry.scrubbed_error(2, "<class 'OSError'>:<'/data/patients/alice.png'>")
    assert "alice" not in error.reason
    assert "code_not_approved" in entry.scrubbed_error(2, "<class '__main__.CodeRefusedError'>:<''>").reason


@pytest.fixture
def superexec() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def test_reply_that_was_sent_whole_leaves_the_superexec_alone(superexec: subprocess.Popen[bytes]):
    with entry.all_or_restart(superexec.pid):
        pass
    assert superexec.poll() is None


def test_reply_that_could_not_be_sent_ends_the_superexec(superexec: subprocess.Popen[bytes]):
    with pytest.raises(OSError, match="cut"), entry.all_or_restart(superexec.pid):
        raise OSError("cut")
    assert superexec.wait(10) == -signal.SIGTERM


def test_process_killed_in_its_reply_ends_the_superexec(superexec: subprocess.Popen[bytes]):
    code = f"""
import os, signal
from client.entry import all_or_restart
with all_or_restart({superexec.pid}):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert superexec.wait(10) == -signal.SIGTERM


def test_guards_replace_loading_unpacking_and_signals(tmp_path: Path):
    code = """
import signal
from client import entry
entry.install_guards(1)
runtime = entry.runtime
load = runtime.get_load_client_app_fn(default_app_ref="", app_path=None, multi_app=True)
assert load("fab", "version", "hash") is entry.client.app.app
try:
    runtime.install_from_fab(b"no bundle", skip_prompt=True)
except entry.CodeRefusedError:
    pass
else:
    raise SystemExit("accepted")
from flwr.supercore.telemetry import EventType
runtime.register_signal_handlers(event_type=EventType.FLWR_CLIENTAPP_RUN_LEAVE, exit_message="", exit_handlers=[])
assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
import sys
for heavy in ("torch", "sqlalchemy", "flwr.superlink", "flwr.supernode.cli", "flwr.superlink.grid"):
    assert heavy not in sys.modules, heavy
"""
    environment = {"MASKFED_CLIENT_HOME": str(tmp_path), "FLWR_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=ROOT, env=environment, timeout=60)
