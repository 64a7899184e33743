"""Where could a secret end up? Markers are planted, a real round is run, and everything that others see is searched.

Planted: names of private images and of their folder, a marker in each private file of site and coordinator (their own
bytes). Searched: logs that the coordinator sees, the site's process logs, command lines and environments of all
processes while they run, join bundles, the Flower bundle, the report's sources, the list of files that may enter a
container build, and the git history's newest tree. A site's `logs/scan.log` is the one place for names of its images.
"""

import base64
import re
import subprocess
import sys
import threading
from pathlib import Path, PurePosixPath

import psutil

from benchmarks.local import LocalFederation, make_experiment, random_checkpoint, tiny_experiment
from benchmarks.measure import without_options
from benchmarks.scratch import scratch
from server.federation.fleet.code_bundle import build_bundle

ROOT = Path(__file__).parent.parent
MARKER = "marker7f3a9c"
PRIVATE_KEY = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?-----END [A-Z ]*PRIVATE KEY-----", re.DOTALL)
PRIVATE_SITE = ("node.key", "site-sign.key", "site.secret", "data.key", "tls/srv.key")
PRIVATE_SERVER = ("pki/server.key", "pki/request.pem", "pki/door-ca.pem", "superexec.secret", "ca/ca.key")


def main() -> int:
    """Search once."""
    with scratch() as folder:
        local = LocalFederation(folder, num_sites=2, image_size=8, num_images=24)
        seen: dict[str, bytes] = {}
        stop = threading.Event()
        try:
            local.set_up()
            plant_names(local)
            local.start()
            watcher = threading.Thread(target=watch_processes, args=(local, seen, stop))
            watcher.start()
            experiment = make_experiment(tiny_experiment(image_size=8, local_steps=3))
            local.finetune(random_checkpoint(local.root / "init", experiment), experiment, "markers")
        finally:
            stop.set()
            local.stop()
        watcher.join()
        needles = secrets_of(local)
        places = places_of(local) | seen | repository()
        found = sorted({f"{name} in {place}" for place, data in places.items() for name in hits(data, needles)})
    print(f"searched {len(places)} places for {len(needles)} secrets")
    details = f": {'; '.join(found[:5])}" if found else ""
    print(f"{len(found)} secrets found in logs, process lists, bundles, build context and git{details}")
    return int(bool(found))


def plant_names(local: LocalFederation) -> None:
    """Give every private image a telling name, and scan again."""
    for index in range(local.num_sites):
        folder = local.root / "images" / f"site-{index}"
        for number, path in enumerate(sorted(folder.rglob("*.png"))):
            path.rename(path.with_name(f"{MARKER}-{number}.png"))
        (folder / f"{MARKER}-broken.png").write_bytes(b"no image")
        local.call("maskfed-client", "data", "scan", "--home", str(local.site(index)), "--allow-unreadable")


def secrets_of(local: LocalFederation) -> dict[str, list[bytes]]:
    """Every private byte string in the forms in which it could leak, by name."""
    needles = {"name of a private image": [MARKER.encode()]}
    private = [local.site(index) / name for index in range(local.num_sites) for name in PRIVATE_SITE]
    for path in [*private, *(local.home / name for name in PRIVATE_SERVER)]:
        needles[str(path.relative_to(local.root))] = forms(path.read_bytes())
    return needles


def forms(secret: bytes) -> list[bytes]:
    """A secret as it is, in hexadecimal and in base64; of PEM lines that hold private bits, of which one is enough."""
    if secret.startswith(b"-----BEGIN"):
        # A certificate may stand beside the key in the same file, and is for everybody.
        return [line for key in PRIVATE_KEY.findall(secret) for line in private_lines(key.splitlines())]
    return [
        secret,
        secret.hex().encode(),
        base64.b64encode(secret).rstrip(b"="),
        base64.urlsafe_b64encode(secret).rstrip(b"="),
    ]


def private_lines(lines: list[bytes]) -> list[bytes]:
    """In PKCS 8 the private number comes first, the public key last; OpenSSH's form begins with the public key."""
    body = lines[1:-1]
    return body[1:-1] if b"OPENSSH" in lines[0] else body[:2]


def watch_processes(local: LocalFederation, seen: dict[str, bytes], stop: threading.Event) -> None:
    """Keep every command line and environment that shows up among the federation's processes."""
    while not stop.wait(0.3):
        for name, group in local.processes().items():
            for process in group:
                try:
                    text = "\n".join([*process.cmdline(), *(f"{k}={v}" for k, v in process.environ().items())])
                except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                    continue
                seen[f"process {name} {process.pid}"] = text.encode()


def places_of(local: LocalFederation) -> dict[str, bytes]:
    """Files that others than the owner of the secret get to see."""
    files = [
        *local.root.glob("*.log"),
        *local.root.glob("*.json"),
        *local.home.rglob("logs/*"),
        local.home / "sites.json",
    ]
    files += [path for path in (local.home / "runs").rglob("*") if path.is_file()]
    for index in range(local.num_sites):
        files += [path for path in (local.site(index) / "logs").iterdir() if path.name != "scan.log"]
        files.append(local.site(index) / "journal.jsonl")
    return {str(path.relative_to(local.root)): path.read_bytes() for path in files}


def repository() -> dict[str, bytes]:
    """The Flower bundle, what may enter a container build, and what git holds."""
    places = {"Flower bundle": build_bundle()}
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False).stdout.decode()
    for name in filter(None, listed.split("\0")):
        path = ROOT / name
        if path.is_file() and not name.startswith(("tests/", "benchmarks/")):
            places[f"git {name}"] = path.read_bytes()
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    homes = {"coordinator", "site", "sites", "runs", "demo"}
    if any(PurePosixPath(name).parts[0] in homes for name in allowed):
        places["build context"] = MARKER.encode()
    return places


def hits(data: bytes, needles: dict[str, list[bytes]]) -> list[str]:
    """Names of the secrets that occur in `data`; a private key's PEM header counts as one, too."""
    found = [name for name, texts in needles.items() if any(text and text in data for text in texts)]
    if b"-----BEGIN OPENSSH PRIVATE" + b" KEY-----\n" in data or b"-----BEGIN PRIVATE" + b" KEY-----\n" in data:
        found.append("a private key")
    return found


if __name__ == "__main__":
    sys.exit(without_options(main, __doc__))
