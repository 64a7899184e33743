"""What an unprivileged user of the machines gets from loopback ports, from /proc and from files, while a round runs.

Needs root, to become somebody else: a child with the user id of nobody, no groups and no capabilities calls every path
that Flower has on every port that the coordinator and a site listen on, reads every command line and environment, and
tries every file of their folders. Needed: no call is accepted, no task token or secret is seen, no file is read. With
`--off` the coordinator runs Flower's own programs, and calls and tokens must be got.
"""

import argparse
import http.client
import json
import os
import re
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES

from benchmarks.local import LocalFederation, command, make_experiment, random_checkpoint, tiny_experiment
from benchmarks.measure import not_measured, verdict
from benchmarks.members import start
from benchmarks.scratch import scratch
from deploy.guards.web.calls import caller_value

NOBODY = 65534
WATCH_SECONDS = 240.0
EXPERIMENT = tiny_experiment(image_size=8, rounds=1, local_steps=1, min_available=1, min_replies=1)
TOKEN = re.compile(rb"[0-9a-f]{200,}")
PATHS = [path for _, path in PROTOBUF_REQUEST_TYPES]


@dataclass
class Loot:
    """What nobody got: accepted calls (path), tokens and secrets seen, readable files, processes whose memory is open.

    And how hard it tried.
    """

    accepted: list[str] = field(default_factory=list)
    refused: int = 0
    tokens: int = 0
    files: list[str] = field(default_factory=list)
    memories: int = 0
    ports: int = 0
    processes: int = 0


def main(arguments: Sequence[str] = ()) -> int:
    """Print what was got, then the verdict."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--off", action="store_true", help="without guards: something must get through")
    is_guarded = not parser.parse_args(arguments).off
    if os.geteuid():
        return not_measured("local user", "it needs root, to become another user")
    with scratch() as folder:
        loot = watch_a_round(folder, is_guarded=is_guarded)
    print("\n".join(f"  accepted: {each}" for each in loot.accepted))
    print("\n".join(f"  readable: {each}" for each in loot.files[:20]))
    text = (
        f"{len(loot.accepted)} of {len(PATHS)} kinds of calls accepted on {loot.ports} ports, {loot.refused} refused, "
        f"{loot.tokens} tokens seen in {loot.processes} processes, {len(loot.files)} files and the memory of "
        f"{loot.memories} processes readable"
    )
    if not is_guarded:
        return verdict("local user, guards off", text, reached=bool(loot.accepted) and loot.tokens > 0)
    has_tried = loot.refused >= len(PATHS) and loot.processes > 0
    is_closed = not (loot.accepted or loot.tokens or loot.files or loot.memories)
    return verdict("local user", text, reached=has_tried and is_closed)


def watch_a_round(root: Path, *, is_guarded: bool) -> Loot:
    """A federation of one site with a round, and what somebody without any right gets meanwhile."""
    root.chmod(0o755)  # the folders of coordinator and site protect themselves
    local = LocalFederation(root, num_sites=1, image_size=8, num_images=24, is_behind_door=True)
    try:
        local.set_up()
        start(local, is_guarded=is_guarded)
        init = random_checkpoint(root / "init", make_experiment(EXPERIMENT))
        (root / "experiment.toml").write_text(EXPERIMENT, encoding="utf-8")
        arguments = ("--init", str(init), "--home", str(local.home), "--run", "watched", "--json")
        finetune = command("maskfed-server", "finetune", str(root / "experiment.toml"), *arguments)
        secrets = secrets_of(local)
        with subprocess.Popen(finetune, stdout=subprocess.DEVNULL) as running:
            try:
                return as_nobody(local, secrets, running.pid)
            finally:
                running.kill()
    finally:
        local.stop()


def secrets_of(local: LocalFederation) -> list[bytes]:
    """What calls of control and runtime paths carry, and where it comes from."""
    files = (local.home / "superexec.secret", local.site(0) / "site.secret")
    return [each for file in files for each in (caller_value(file).encode(), file.read_bytes())]


def pids_of(local: LocalFederation) -> set[int]:
    """The federation's processes."""
    return {process.pid for group in local.processes().values() for process in group}


def ports_of(pids: set[int]) -> list[int]:
    """Ports that processes listen on."""
    connections = psutil.net_connections("tcp")
    return sorted({each.laddr.port for each in connections if each.pid in pids and each.status == psutil.CONN_LISTEN})


def as_nobody(local: LocalFederation, secrets: Sequence[bytes], run_pid: int) -> Loot:
    """What a child without any right gets until the process `run_pid` is over; it has dropped all before it begins."""
    pids, homes = pids_of(local), [local.home, local.site(0)]
    ports = ports_of(pids)
    calls(ports[:1])  # whatever Python loads for a call is loaded by now: nobody may not be able to read it
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        loot = Loot(ports=len(ports))
        watcher = threading.Thread(target=watch_processes, args=(loot, secrets, run_pid))
        watcher.start()
        loot.files = readable(homes)
        loot.memories = sum(can_open(Path(f"/proc/{each}/mem")) for each in pids)
        loot.accepted, loot.refused = calls(ports)
        watcher.join()
        with os.fdopen(writer, "w") as file:
            json.dump(vars(loot), file)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        found = json.load(file)
    os.waitpid(pid, 0)
    return Loot(**found)


def calls(ports: Sequence[int]) -> tuple[list[str], int]:
    """Paths that answered an empty request with success, on any port; how many answers were refusals."""
    context = ssl._create_unverified_context()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    found, refused = set(), 0
    for port in ports:
        for path in PATHS:
            request = urllib.request.Request(
                f"https://127.0.0.1:{port}{path}", data=b"", headers={"content-type": "application/protobuf"}
            )
            try:
                with opener.open(request, timeout=5) as reply:
                    found.add(path if reply.status < 300 else "")
            except urllib.error.HTTPError:
                refused += 1
            except (OSError, ValueError, http.client.HTTPException):  # no TLS or no HTTP is spoken there
                continue
    return sorted(found - {""}), refused


def watch_processes(loot: Loot, secrets: Sequence[bytes], run_pid: int) -> None:
    """Count distinct task tokens and secrets on command lines and in environments, and the processes that were read."""
    found: set[bytes] = set()
    seen: set[str] = set()
    deadline = time.monotonic() + WATCH_SECONDS
    while time.monotonic() < deadline and not is_over(run_pid):
        for folder in Path("/proc").glob("[0-9]*"):
            for name in ("cmdline", "environ"):
                try:
                    content = (folder / name).read_bytes()
                except OSError:
                    continue
                seen.add(folder.name)
                found.update(TOKEN.findall(content), (secret for secret in secrets if secret in content))
        time.sleep(0.05)
    loot.tokens, loot.processes = len(found), len(seen)


def is_over(pid: int) -> bool:
    """Whether a process has ended, reaped or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] == b"Z"
    except OSError:
        return True


def can_open(file: Path) -> bool:
    """Whether a file can be opened for reading; of a process's memory `os.access` says nothing."""
    try:
        file.open("rb").close()
    except OSError:
        return False
    return True


def readable(homes: Sequence[Path]) -> list[str]:
    """Files below the folders that can be opened."""
    return [str(file) for home in homes for file in home.rglob("*") if file.is_file() and os.access(file, os.R_OK)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
