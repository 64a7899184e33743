"""What an unprivileged user of the machines gets from loopback ports and from /proc, while a round runs.

Needs root, to become somebody else: a child with the user id of nobody, no groups and no capabilities calls every path
that Flower has on every port that the federation listens on, and reads every command line. Needed: no call is accepted,
no task token is seen. With `--off` the coordinator runs Flower's own programs, and calls and tokens must be got.
"""

import json
import os
import re
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import psutil
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES

from benchmarks.local import LocalFederation, command, make_experiment, random_checkpoint, tiny_experiment
from benchmarks.measure import verdict
from benchmarks.members import start

NOBODY = 65534
WATCH_SECONDS = 60.0
EXPERIMENT = tiny_experiment(image_size=8, rounds=1, local_steps=1, min_available=1, min_replies=1)
TOKEN = re.compile(rb"[0-9a-f]{200,}")
PATHS = [path for _, path in PROTOBUF_REQUEST_TYPES if not path.startswith("/v1/fleet/")]


def main(arguments: Sequence[str] = ()) -> int:
    """Print what was got, then the verdict."""
    if os.geteuid():
        return verdict("local user", "needs root to become another user", reached=False)
    is_guarded = "--off" not in arguments
    with tempfile.TemporaryDirectory(prefix="maskfed-") as folder:
        accepted, tokens = watch_a_round(Path(folder), is_guarded=is_guarded)
    text = f"{len(accepted)} of {len(PATHS)} kinds of calls accepted, {tokens} tokens seen"
    print("\n".join(f"  accepted: {each}" for each in accepted))
    if not is_guarded:
        return verdict("local user, guards off", text, reached=bool(accepted) and tokens > 0)
    return verdict("local user", text, reached=not accepted and not tokens)


def watch_a_round(root: Path, *, is_guarded: bool) -> tuple[list[str], int]:
    """A federation of one site with a round; the calls that nobody got accepted, and the tokens that nobody saw."""
    local = LocalFederation(root, num_sites=1, image_size=8, num_images=24)
    try:
        local.set_up()
        start(local, is_guarded=is_guarded)
        init = random_checkpoint(root / "init", make_experiment(EXPERIMENT))
        (root / "experiment.toml").write_text(EXPERIMENT, encoding="utf-8")
        arguments = ("--init", str(init), "--home", str(local.home), "--run", "watched", "--json")
        finetune = command("maskfed-server", "finetune", str(root / "experiment.toml"), *arguments)
        with subprocess.Popen(finetune, stdout=subprocess.DEVNULL) as running:
            try:
                return as_nobody(ports_of(local))
            finally:
                running.kill()
    finally:
        local.stop()


def ports_of(local: LocalFederation) -> list[int]:
    """Ports that the federation's processes listen on."""
    pids = {process.pid for group in local.processes().values() for process in group}
    connections = psutil.net_connections("tcp")
    return sorted({each.laddr.port for each in connections if each.pid in pids and each.status == psutil.CONN_LISTEN})


def as_nobody(ports: Sequence[int]) -> tuple[list[str], int]:
    """What a child without any right gets; it has dropped all of them before it begins."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        with os.fdopen(writer, "w") as file:
            json.dump([calls(ports), tokens_in_command_lines(WATCH_SECONDS)], file)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        accepted, tokens = json.load(file)
    os.waitpid(pid, 0)
    return accepted, tokens


def calls(ports: Sequence[int]) -> list[str]:
    """Paths that answered an empty request with success, on any port."""
    context = ssl._create_unverified_context()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    found = set()
    for port in ports:
        for path in PATHS:
            request = urllib.request.Request(
                f"https://127.0.0.1:{port}{path}", data=b"", headers={"content-type": "application/protobuf"}
            )
            try:
                with opener.open(request, timeout=5) as reply:
                    found.add(path if reply.status < 300 else "")
            except (urllib.error.URLError, OSError, ValueError):
                continue
    return sorted(found - {""})


def tokens_in_command_lines(seconds: float) -> int:
    """Distinct task tokens on command lines and in readable environments within `seconds`."""
    found: set[bytes] = set()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for folder in Path("/proc").glob("[0-9]*"):
            for name in ("cmdline", "environ"):
                try:
                    found.update(TOKEN.findall((folder / name).read_bytes()))
                except OSError:
                    continue
        time.sleep(0.05)
    return len(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
