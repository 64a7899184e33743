"""A federation on three hosts: network namespaces behind a bridge, each with an address and a link that can be cut.

Set up by the operators' own commands, from clean folders; sites reach only nginx.
"""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.local import ONLINE_SECONDS, OPEN_POLICY, command, make_experiment, random_checkpoint
from benchmarks.measure import UNMEASURED
from client.records.data_registry import REGISTRY_VARIABLE
from deploy.processes.process import adopt_orphans, end_descendants
from shared.data.synthetic import write_folder
from shared.storage.runlog import read_metrics

PORT = 443
NETWORK = "10.213.77"
STOP_SECONDS = 40.0


@dataclass
class Host:
    """One namespace: `address` inside it, `link` is its end on the bridge."""

    name: str
    address: str
    link: str
    folder: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def run(self, *arguments: str, check: bool = True, env: Mapping[str, str] | None = None) -> str:
        """Output of a program of the project that runs on this host, in its own folder."""
        done = subprocess.run(
            self._inside(*arguments), capture_output=True, text=True, check=False, cwd=self.folder, env=env
        )
        if check and done.returncode:
            raise RuntimeError(
                f"{' '.join(arguments[:3])} on {self.name}: exit {done.returncode}: {done.stderr[-2000:]}"
            )
        return done.stdout

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """A program of the project that stays, output in `<name>.log`."""
        with (self.folder / f"{self.name}.log").open("ab") as log:
            process = subprocess.Popen(
                self._inside(*arguments), stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder
            )
        self.processes.append(process)
        return process

    def cut(self) -> None:
        """Pull the cable."""
        _ip("link", "set", self.link, "down")

    def heal(self) -> None:
        """Plug it in again."""
        _ip("link", "set", self.link, "up")

    def kill(self) -> None:
        """Every process of this host at once, as a power cut would."""
        family = [process for leader in self.processes for process in _family(leader.pid)]
        for process in family:
            # Most die with their parent, which may be quicker.
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=10)
        self.processes.clear()

    def stop(self) -> None:
        """SIGTERM, and SIGKILL to what stays."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self.processes:
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
        self.processes.clear()

    def _inside(self, *arguments: str) -> list[str]:
        return ["ip", "netns", "exec", self.name, *command(*arguments)]


def reason_against() -> str | None:
    """Why namespaces cannot be made here; None when they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None or shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin") is None:
        return "`ip` and nginx are needed"
    space = f"mfp{os.getpid() % 10**7}"
    bridge, link = f"{space}b", f"{space}l"
    needed = (
        ["netns", "add", space],
        ["link", "add", bridge, "type", "bridge"],
        ["link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", space],
        ["netns", "exec", space, "true"],
    )
    # The first command that fails ends the trial; what it has made goes again.
    tried = (subprocess.run(["ip", *words], capture_output=True, text=True, check=False) for words in needed)
    failed = next((done for done in tried if done.returncode), None)
    for words in (["link", "del", link], ["link", "del", bridge], ["netns", "del", space]):
        subprocess.run(["ip", *words], capture_output=True, check=False)
    if failed is not None:
        return f"this machine makes no network namespaces with bridges: {failed.stderr.strip() or failed.args}"
    return None


@contextmanager
def hosts(root: Path, names: tuple[str, ...]) -> Iterator[list[Host]]:
    """Hosts on one bridge; processes, namespaces and links end with the block."""
    adopt_orphans()
    tag = f"{os.getpid() % 100000}"
    bridge = f"mfb{tag}"
    made: list[Host] = []
    os.environ["PATH"] = f"{os.environ.get('PATH', '')}:/usr/sbin"
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ[REGISTRY_VARIABLE] = str(root / "registry")
    _ip("link", "add", bridge, "type", "bridge")
    try:
        _ip("link", "set", bridge, "up")
        for number, name in enumerate(names, start=1):
            folder = root / name
            folder.mkdir()
            made.append(_make(f"mf{tag}{name}", f"{NETWORK}.{number}", f"mfl{tag}{number}", bridge, folder))
        yield made
    finally:
        for host in reversed(made):
            host.stop()
        end_descendants()
        for host in made:
            subprocess.run(["ip", "netns", "del", host.name], check=False)
        subprocess.run(["ip", "link", "del", bridge], check=False)


@contextmanager
def federation_on_hosts(experiment: str, *init_options: str) -> Iterator[tuple[Host, Host, Host]]:
    """Server and two sites, everything started and both sites online; `round.toml` and `init` lie at the server."""
    with prepared_hosts(experiment) as (server, *sites):
        set_up(server, *sites, init_options=init_options)
        wait_for(lambda: num_online(server) == len(sites), ONLINE_SECONDS, "both sites online")
        yield server, sites[0], sites[1]


@contextmanager
def prepared_hosts(experiment: str) -> Iterator[list[Host]]:
    """Server and two sites with what their operators have before they begin: images, a checkpoint, an experiment."""
    with tempfile.TemporaryDirectory(prefix="maskfed-") as folder, hosts(Path(folder), ("s", "a", "b")) as machines:
        prepare(machines[0], machines[1:], experiment)
        yield machines


def prepare(server: Host, sites: Sequence[Host], experiment: str) -> None:
    """What operators have before they begin: images at the sites, `round.toml` and `init` at the server."""
    resolved = make_experiment(experiment)
    (server.folder / "round.toml").write_text(experiment)
    random_checkpoint(server.folder / "init", resolved)
    for number, site in enumerate(sites):
        write_folder(site.folder / "images", 48, resolved.model.image_size, 0, site=f"site{number}")


def set_up(
    server: Host,
    *sites: Host,
    init_options: tuple[str, ...] = (),
    starter: tuple[str, ...] = ("maskfed-server",),
) -> int:
    """From nothing to all processes running, the server by `starter`; the number of commands typed."""
    server.run("maskfed-server", "init", "--address", f"{server.address}:{PORT}", *init_options)
    server.start(*starter, "start")
    requests = [site.run("maskfed-client", "enroll", f"site-{n}").strip() for n, site in enumerate(sites)]
    server.run("maskfed-server", "sites", "add", *requests)
    size = str(make_experiment((server.folder / "round.toml").read_text()).model.image_size)
    for number, site in enumerate(sites):
        bundle = f"site-{number}.join.json"
        (site.folder / bundle).write_bytes((server.folder / bundle).read_bytes())
        images = ("--data", "images", "--image-size", size, "--head-file", "head.json")
        site.start("maskfed-client", "join", bundle, *images, *OPEN_POLICY, "--start")
    return 3 + 2 * len(sites)


def num_online(server: Host) -> int:
    """Sites that the server sees online."""
    return server.run("maskfed-server", "sites", "list").count(" online ")


def rounds(server: Host, run: str) -> list[dict[str, Any]]:
    """Records of the rounds that are done."""
    events = read_metrics(server.folder / "coordinator" / "runs" / run / "metrics.jsonl")
    return [event for event in events if event["kind"] == "round"]


def wait_for(condition: object, seconds: float, what: str) -> float:
    """Poll until `condition()` is true; seconds waited.

    Raises:
        TimeoutError: naming what did not happen.
    """
    begun = time.monotonic()
    while not condition():  # type: ignore[operator]
        if time.monotonic() - begun > seconds:
            raise TimeoutError(f"{what} did not happen within {seconds:.0f} s")
        time.sleep(0.2)
    return time.monotonic() - begun


def not_measured(reason: str) -> int:
    """Last line of a benchmark that this machine cannot run."""
    print(f"not measured: {reason}")
    return UNMEASURED


def _make(name: str, address: str, link: str, bridge: str, folder: Path) -> Host:
    _ip("netns", "add", name)
    _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
    _ip("link", "set", link, "master", bridge, "up")
    for arguments in (
        ("addr", "add", f"{address}/24", "dev", "eth0"),
        ("link", "set", "eth0", "up"),
        ("link", "set", "lo", "up"),
    ):
        _ip("-n", name, *arguments)
    return Host(name, address, link, folder)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def _family(pid: int) -> list[psutil.Process]:
    try:
        return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
