"""The client code that is installed here: whether it is the coordinator's, approved, and what has changed in it."""

import hashlib
import json
from pathlib import Path
from typing import Literal

import shared
from client.home import Home
from client.policy.approval import approve
from client.private_files import write_private
from client.records.journal import Journal
from shared.errors import InputError
from shared.storage.code_digest import installed_digest, site_files

APPROVED_FILES = "approved-files.json"
"""Digest of each file of the code that was approved last, in the home."""


def check_installed(wanted: str) -> None:
    """Refuse to join a coordinator whose client code is another than what is installed here.

    Raises:
        InputError: naming both digests.
    """
    digest = installed_digest()
    if digest != wanted:
        raise InputError(
            f"installed client code has digest {digest[:12]}, the coordinator's is {wanted[:12]}: "
            "install the same version"
        )


def approve_installed(place: Home) -> None:
    """Approve the client code installed here, and keep what its files are for the next comparison."""
    digest = installed_digest()
    approve(place, "code", digest)
    write_private(place.path / APPROVED_FILES, json.dumps(file_digests()).encode())
    Journal(place.journal).write("approval", what="code", digest=digest)


def changed_files(place: Home) -> list[str]:
    """One line per file that differs from the code approved last."""
    path = place.path / APPROVED_FILES
    before: dict[str, str] = json.loads(path.read_bytes()) if path.exists() else {}
    now = file_digests()
    marks: list[tuple[Literal["added", "changed", "removed"], set[str]]] = [
        ("added", now.keys() - before.keys()),
        ("changed", {name for name in now.keys() & before.keys() if now[name] != before[name]}),
        ("removed", before.keys() - now.keys()),
    ]
    return [f"{mark} {name}" for mark, names in marks for name in sorted(names)] or ["no file has changed"]


def file_digests() -> dict[str, str]:
    """SHA-256 of each installed file of client code."""
    files = site_files(Path(shared.__file__).resolve().parent.parent)
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
