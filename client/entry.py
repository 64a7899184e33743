"""The process that Flower starts for each message: it runs this installation's code and nothing from a bundle.

One of two files that use flwr internals, written against flwr 1.42.0; `tests/client/test_entry.py` fails on another.
The bundle of a run is read in memory only: its `client` and `shared` files must have the digest that the operator has
approved, as must the files installed here, and it may bring nothing else that could be imported. It is never unpacked
and never on `sys.path`, so its copy of this very code is dead weight.
"""

import argparse
import io
import os
import signal
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"

import flwr.supernode.runtime.run_clientapp as runtime
from flwr.app.error import Error
from flwr.supercore.tls import validate_and_resolve_root_certificates

import client.app
import client.offers.answer
from client.home import find_home
from client.memory import LARGEST_VARIABLE, largest_message_bytes, largest_task_bytes, watch_memory
from client.policy.approval import Approved, read_approved
from client.records.journal import Journal
from client.settings import SitePolicy, load_settings
from shared.errors import InputError
from shared.storage.code_digest import SITE_PACKAGES, files_digest, installed_digest

EXPECTED = client.offers.answer.EXPECTED
"""What later processes of messages will load: the warmed parent looks here when this one ends."""
FLWR_VERSION = "1.42.0"
LARGEST_BUNDLE_BYTES = 64 * 2**20
FAILURE = "the site's app failed; its operator finds the cause in the site's own log"

LOADED = installed_digest()
"""The code that this process has loaded: a forked one loaded it long before its message came."""
NOT_APPROVED = "code_not_approved: the site's operator has not approved this code"


class CodeRefusedError(Exception):
    """Code that the operator has not approved; the text leaves the site."""


def main() -> None:
    """Run Flower's client process with this site's guards in place."""
    os.umask(0o077)
    options = read_options(sys.argv[1:])
    install_guards(options.parent_pid)
    limit_memory()
    sys.argv[0] = "flwr-clientapp"
    runtime.run_clientapp(
        runtime_api_address=options.runtime_api_address,
        token=options.token,
        insecure=options.insecure,
        certificates=validate_and_resolve_root_certificates(options.root_certificates, options.insecure),
        parent_pid=options.parent_pid,
    )


def read_options(arguments: list[str]) -> argparse.Namespace:
    """What the superexec says; Flower's own parser would load half of its server with it."""
    parser = argparse.ArgumentParser(prog="client.entry")
    for name in ("--runtime-api-address", "--token"):
        parser.add_argument(name, required=True)
    parser.add_argument("--parent-pid", type=int, required=True)
    parser.add_argument("--insecure", action="store_true")
    parser.add_argument("--root-certificates")
    return parser.parse_args(arguments)


def limit_memory() -> None:
    """Let messages and tasks be as large as the policy's largest model needs, and no larger."""
    try:
        policy = load_settings(find_home()).policy
    except InputError:  # whoever answers tells what is wrong with the settings; until then the defaults hold
        policy = SitePolicy()
    os.environ[LARGEST_VARIABLE] = str(largest_message_bytes(policy))
    watch_memory(largest_task_bytes(policy))


def install_guards(superexec: int) -> None:
    """Replace the parts of Flower's runtime that would trust the coordinator or tell it too much.

    `superexec` is the process that ends when a reply is not sent whole.
    """
    register, push = vars(runtime)["register_signal_handlers"], runtime.push_task_output
    push_reply = runtime.push_message

    def register_then_default(*args: object, **kwargs: object) -> None:
        # Flower's own handlers leave the SuperNode waiting for ever; a process that dies at once is noticed.
        register(*args, **kwargs)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)

    def push_scrubbed(*args: Any, **kwargs: Any) -> None:  # noqa: ANN401  # Flower's own arguments
        push(*args, **kwargs | {"details": FAILURE if kwargs.get("details") else ""})

    def push_whole(*args: Any, **kwargs: Any) -> None:  # noqa: ANN401  # Flower's own arguments
        with all_or_restart(superexec):
            push_reply(*args, **kwargs)

    guards = {
        "register_signal_handlers": register_then_default,
        "install_from_fab": lambda fab_file, **_: check_bundle(fab_file),
        "get_load_client_app_fn": lambda **_: lambda *_: client.app.app,
        "push_message": push_whole,
        "push_task_output": push_scrubbed,
        "Error": scrubbed_error,
    }
    for name, guard in guards.items():
        setattr(runtime, name, guard)


@contextmanager
def all_or_restart(superexec: int) -> Iterator[None]:
    """End the superexec when this process dies, or fails, inside the block; its supervisor then restarts the SuperNode.

    A SuperNode that was promised a reply waits for the rest of it without end. After a restart the coordinator asks
    again, and the stored reply is sent. A shell waits beside us, for a killed process can do nothing for itself.
    """
    line = 'read -r line || kill "$1"'
    with subprocess.Popen(["/bin/sh", "-c", line, "sh", str(superexec)], stdin=subprocess.PIPE) as watcher:
        yield
        watcher.communicate(b"whole\n")


def scrubbed_error(code: int, reason: str | None = None) -> Error:
    """Flower's error reply without the text of exceptions, which may carry paths; refused code says so."""
    told = CodeRefusedError.__name__ in (reason or "")
    return Error(code=code, reason=NOT_APPROVED if told else FAILURE)


def check_bundle(content: bytes) -> None:
    """Refuse unapproved code, whether in the bundle or installed here.

    Raises:
        CodeRefusedError: it differs from what `maskfed-client approve` has accepted.
    """
    home = find_home()
    approved = read_approved(home)
    problem = bundle_problem(content, approved) or installed_problem(approved)
    if problem:
        Journal(home.journal).write("refusal", code="code_not_approved", reason=problem)
        raise CodeRefusedError("code_not_approved")


def bundle_problem(content: bytes, approved: Approved) -> str | None:
    """Why a bundle is not acceptable, for the operator; None when it is."""
    try:
        files = read_bundle(content)
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, ValueError) as error:
        return f"the bundle cannot be read ({type(error).__name__})"
    for name in files:
        parts = PurePosixPath(name).parts
        is_package = len(parts) > 1 and parts[0] in {"server", *SITE_PACKAGES}
        is_known = is_package or name == "pyproject.toml" or parts[0] == ".info"
        if not is_known or ".." in parts or name.startswith("/"):
            return f"the bundle brings {name[:80]!r}, which no bundle needs"
    digest = files_digest({name: data for name, data in files.items() if data is not None})
    if digest not in approved.code:
        return f"the bundle's client code has digest {digest}, which is not approved"
    return None


def installed_problem(approved: Approved) -> str | None:
    """Why the code installed here, or the code that this process was loaded from, is not acceptable; None: it is."""
    for place, digest in (("installed client code", installed_digest()), ("client code that runs", LOADED)):
        if digest not in approved.code:
            return f"the {place} has digest {digest}, which is not approved"
    return None


def read_bundle(content: bytes) -> dict[str, bytes | None]:
    """The files of a Flower bundle by name, in memory; None for those that no site runs: they are not even unpacked.

    Raises:
        ValueError: too large, or a name occurs twice.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = [entry for entry in archive.infolist() if not entry.is_dir()]
        if sum(entry.file_size for entry in entries) > LARGEST_BUNDLE_BYTES:
            raise ValueError("too large")
        if len({entry.filename for entry in entries}) < len(entries):
            raise ValueError("a name occurs twice")
        return {
            entry.filename: archive.read(entry) if entry.filename.split("/")[0] in SITE_PACKAGES else None
            for entry in entries
        }


if __name__ == "__main__":
    main()
