"""Folders that benchmarks work in: whatever ends a benchmark, nothing of it stays on the machine.

SIGTERM, SIGINT and SIGHUP end the block as an error does, so that everything inside is taken down. What a killed one
has left goes with the next start of the same user: the folders whose lock nobody holds any more, disks mounted below
them, and the namespaces and links that they say are theirs. What is another's, or in use, is not touched.
"""

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

PREFIX = "maskfed-bench-"
NETWORK_FILE = "network"
"""Beside the folder that a benchmark works in: a line for each namespace and link, written before it is made."""
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
MOUNTS = Path("/proc/self/mountinfo")
_NOTED = re.compile(r"(netns|link) (mf[a-z0-9]{1,13})")
_open: list[Path] = []


@contextmanager
def scratch() -> Iterator[Path]:
    """An empty folder (0700) that goes with the block, and all that is mounted in it or noted."""
    remove_left()
    folder, lock = _make()
    _open.append(folder)
    try:
        with ended_by_signals():
            try:
                (folder / "inside").mkdir()
                yield folder / "inside"
            finally:
                _remove(folder)
    finally:
        _open.remove(folder)
        os.close(lock)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let the first of `ENDING` end the block by `SystemExit`; while it is taken down, no further one does anything."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _end) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is _end:
                signal.signal(number, handler)


def note(kind: str, name: str) -> None:
    """A namespace (`netns`) or `link` is about to be made, and is of the innermost open folder."""
    if not _NOTED.fullmatch(f"{kind} {name}"):
        raise ValueError(f"{kind} {name}: nothing of that name would be removed")
    with (_open[-1] / NETWORK_FILE).open("a", encoding="ascii") as file:
        file.write(f"{kind} {name}\n")


def remove_left() -> None:
    """Remove what killed benchmarks of this user have left, and say so."""
    for folder in sorted(Path(tempfile.gettempdir()).resolve().glob(f"{PREFIX}*")):
        lock = _lock(folder)
        if lock is None:
            continue
        try:
            _remove(folder)
            print(f"removed {folder}, left by a benchmark that was killed", file=sys.stderr)
        except OSError as error:
            print(f"{folder}, left by a benchmark that was killed, cannot be removed: {error}", file=sys.stderr)
        finally:
            os.close(lock)


def _make() -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX)).resolve()
        # Another start may have taken it, in this moment, for what somebody has left.
        if (lock := _lock(folder)) is not None:
            return folder, lock


def _lock(folder: Path) -> int | None:
    """The folder, opened and locked; None where it is no folder of this user, or in use."""
    try:
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(opened).st_uid == os.geteuid() and os.path.samestat(os.fstat(opened), folder.lstat()):
            return opened
    except OSError:
        pass
    os.close(opened)
    return None


def _remove(folder: Path) -> None:
    with suppress(FileNotFoundError):
        for kind, name in _NOTED.findall((folder / NETWORK_FILE).read_text(encoding="ascii", errors="replace")):
            _remove_network(kind, name)
    for place in mounted_below(folder):
        subprocess.run(["umount", "--lazy", place], check=False)
    shutil.rmtree(folder)


def _remove_network(kind: str, name: str) -> None:
    """End what still runs in a namespace, and remove it, or a link; it may be gone, with the namespace at its end."""
    if kind == "link":
        subprocess.run(["ip", "link", "del", name], check=False, capture_output=True)
        return
    found = subprocess.run(["ip", "netns", "pids", name], check=False, capture_output=True, text=True).stdout
    for pid in found.split():
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def mounted_below(folder: Path) -> list[Path]:
    """Where file systems are mounted below a folder, the innermost first."""
    words = [line.split() for line in MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()]
    # The kernel writes blanks and the like as `\040`.
    places = [Path(re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), line[4])) for line in words]
    return sorted((place for place in places if folder in place.parents), reverse=True)


def _end(number: int, _frame: FrameType | None) -> None:
    for each in ENDING:
        signal.signal(each, signal.SIG_IGN)
    raise SystemExit(128 + number)
