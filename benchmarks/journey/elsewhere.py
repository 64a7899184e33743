"""Both bundles checked on a machine that has one file of ours, Python and `cryptography`, and nothing else."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.hosts import Host
from benchmarks.journey.documents import ROOT

NEEDED = ("cryptography", "cffi", "_cffi_backend", "pycparser")
"""`cryptography` and what it is made of; the last ones only where its wheel needs them."""
KEY = re.compile(r"--key ([0-9a-f]{64})")


def key_of(printed: str) -> str:
    """The key that a command has printed for the check of its bundle.

    Raises:
        RuntimeError: it printed none.
    """
    found = KEY.search(printed)
    if found is None:
        raise RuntimeError(f"no key was printed: {printed[-500:]}")
    return found[1]


def check(host: Host, bundle: Path, key: str) -> None:
    """Verify a bundle on `host` with the stand-alone file; a changed byte and another key must be refused.

    Raises:
        RuntimeError: it was not verified, or what was changed was.
    """
    packages = _packages(host.folder)
    shutil.copy(ROOT / "shared" / "evidence" / "verify.py", host.folder / "verify.py")
    there = host.folder / bundle.name
    shutil.copy(bundle, there)
    if status := _verify(host, packages, there.name, key):
        raise RuntimeError(f"{bundle.name} is not verified elsewhere: exit {status}")
    other = "0" * 64
    changed = bytearray(there.read_bytes())
    changed[len(changed) // 2] ^= 1
    (host.folder / "changed.zip").write_bytes(changed)
    if not (_verify(host, packages, there.name, other) and _verify(host, packages, "changed.zip", key)):
        raise RuntimeError(f"{bundle.name}: another key, or a changed byte, was accepted")


def _verify(host: Host, packages: Path, file: str, key: str) -> int:
    # -S: no site-packages, so nothing that is installed here can help.
    words = ["ip", "netns", "exec", host.name, sys.executable, "-S", "verify.py", file, "--key", key]
    print(f"{host.name}$ python verify.py {file} --key {key[:12]}...", flush=True)
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(packages)}
    done = subprocess.run(words, cwd=host.folder, env=environment, capture_output=True, text=True, check=False)
    print(done.stdout.strip().splitlines()[0] if done.stdout.strip() else done.stderr.strip(), flush=True)
    return done.returncode


def _packages(folder: Path) -> Path:
    """A folder with `cryptography` alone."""
    target = folder / "packages"
    target.mkdir(exist_ok=True)
    for name in NEEDED:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            continue
        origin = Path(spec.origin)
        place = origin.parent if origin.name == "__init__.py" else origin
        if not (target / place.name).exists():
            (target / place.name).symlink_to(place)
    return target
