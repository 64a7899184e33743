"""What a number was computed with: package versions and the project's commit, without importing any of the packages."""

import functools
import platform
import subprocess
from importlib import metadata
from pathlib import Path

FIGURES = "benchmarks/BENCHMARKS.md"
"""What measuring writes: it changes nothing that is measured."""
PACKAGES = ("maskfed", "torch", "numpy", "safetensors", "flwr", "opacus", "torch-fidelity")


@functools.cache
def installed_versions() -> dict[str, str]:
    """Version of Python and of every package of `PACKAGES` that is installed."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


@functools.cache
def git_commit() -> str | None:
    """Commit of the project's work tree, with `+changes` when tracked files differ from it; None outside of one."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    head = _git(root, "rev-parse", "HEAD")
    if head is None:
        return None
    changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", f":(exclude){FIGURES}")
    return head + ("+changes" if changed else "")


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
