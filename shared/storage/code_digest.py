"""One number for the code that a site runs: what an operator approves, and what a bundle is compared with.

Only the packages `client` and `shared` count. A change in `server` never runs at a site, so it needs no approval.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

SITE_PACKAGES = ("client", "shared")


def site_files(root: Path) -> dict[str, bytes]:
    """Relative POSIX path to content of every `*.py` of `client` and `shared` below `root`, the tree's top folder."""
    paths = [path for package in SITE_PACKAGES for path in (root / package).rglob("*.py")]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


def files_digest(files: Mapping[str, bytes]) -> str:
    """SHA-256 over the sorted paths and the SHA-256 of each content, 64 hexadecimal digits."""
    hasher = hashlib.sha256()
    for path in sorted(files):
        hasher.update(f"{path}\0{hashlib.sha256(files[path]).hexdigest()}\n".encode())
    return hasher.hexdigest()


def installed_digest() -> str:
    """The digest of the code this process runs from, wherever it is installed."""
    return files_digest(site_files(Path(__file__).resolve().parents[2]))
