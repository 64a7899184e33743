"""A real federation on this machine, by the operators' own commands, for the benchmarks that need processes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.disks import small_disk
from benchmarks.scratch import scratch
from client.records.data_registry import REGISTRY_VARIABLE
from deploy.processes.process import free_ports, spawn
from shared.data.synthetic import write_folder
from shared.experiment.config import Experiment, parse_experiment
from shared.storage.checkpoint import save_checkpoint

ONLINE_SECONDS = 120.0
STOP_SECONDS = 40.0
OPEN_POLICY = (
    *("--unit", "image"),
    *("--allow-non-private", "--allow-any-experiment", "--max-steps", "100000", "--max-rounds", "100000"),
    *("--release", "loss", "--release", "seconds", "--device", "cpu", "--threads", "1"),
)
"""Options of `maskfed-client join` for a site that answers whatever a benchmark asks."""
PROGRAMS = {
    "flower-superexec": "deploy.guards.superexec",
    "flower-superlink": "deploy.guards.superlink",
    "flower-supernode": "deploy.guards.supernode",
    "flwr-clientapp": "client.entry",
    "flwr-serverapp": "server.entry",
}
"""Flower's names of the processes, with the module that each runs: `python -I -m MODULE`, or `-m GUARD MODULE`."""


def command(*arguments: str) -> list[str]:
    """Arguments that start one of the project's programs."""
    return [str(Path(sys.executable).parent / arguments[0]), *arguments[1:]]


@dataclass
class LocalFederation:
    """Coordinator and sites in `root`, with synthetic faces; every daemon is a child of this process."""

    root: Path
    num_sites: int
    image_size: int = 32
    num_images: int = 64
    is_behind_door: bool = False
    """Whether the sites reach the coordinator through nginx, as over a network."""
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    ports: list[int] = field(default_factory=list)
    address: str = ""
    """Where sites reach the coordinator."""

    @property
    def home(self) -> Path:
        """The coordinator's folder."""
        return self.root / "coordinator"

    def site(self, index: int) -> Path:
        """A site's folder."""
        return self.root / f"site-{index}"

    def set_up(self) -> None:
        """Everything up to `start`: keys, bundles, images, caches."""
        # Its sites are strangers to those of other federations, which may be made of the same faces.
        os.environ[REGISTRY_VARIABLE] = str(self.root / "registry")
        *self.ports, door = free_ports(3 + 2 * self.num_sites)
        self.address = f"localhost:{door if self.is_behind_door else self.ports[0]}"
        port, health = map(str, self.ports[:2])
        ports, address = ("--port", port, "--health-port", health), ("--edge", "--address", self.address)
        self.call("maskfed-server", "init", "--home", str(self.home), *ports, *(address if self.is_behind_door else ()))
        for index in range(self.num_sites):
            images, bundle = self.root / "images" / f"site-{index}", self.root / f"site-{index}.json"
            write_folder(images, self.num_images, self.image_size, 0, site=f"site{index}")
            home = ("--home", str(self.site(index)))
            request = self.call("maskfed-client", "enroll", f"site-{index}", *home).strip().splitlines()[-1]
            self.call("maskfed-server", "sites", "add", request, "--home", str(self.home), "--bundle", str(bundle))
            head = ("--head-file", str(self.root / "heads" / f"site-{index}.json"))
            images_of = ("--data", str(images), "--image-size", str(self.image_size))
            self.call("maskfed-client", "join", str(bundle), *home, *images_of, *head, *OPEN_POLICY)
            self.call("maskfed-client", "data", "scan", *home)

    def start(self) -> None:
        """Start every daemon that is not running, and wait until all sites are online."""
        self._daemon("coordinator", "maskfed-server", "start", "--home", str(self.home))
        for index in range(self.num_sites):
            port, health = map(str, self.ports[2 + 2 * index : 4 + 2 * index])
            self._daemon(f"site-{index}", "maskfed-client", "start", "--home", str(self.site(index)),
                         "--port", port, "--health-port", health)  # fmt: skip
        deadline = time.monotonic() + ONLINE_SECONDS
        while self.num_online() < self.num_sites:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.num_online()} of {self.num_sites} sites online: see {self.root}/*.log")
            time.sleep(0.5)

    def num_online(self) -> int:
        """Sites that the SuperLink sees online."""
        from server.federation.fleet.superlink import connect
        from server.federation.fleet.superlink_types import ControlError

        try:
            with connect(self.home) as control:
                return sum(node.status == "online" for node in control.nodes())
        except ControlError:
            return 0

    def finetune(self, init: Path, experiment: Experiment, run: str, *further: str) -> dict[str, object]:
        """A run from start to end; its JSON summary."""
        file = self.root / f"{run}.toml"
        file.write_text(experiment.to_toml(), encoding="utf-8")
        arguments = ("--init", str(init), "--home", str(self.home), "--run", run, "--json", *further)
        summary: dict[str, object] = json.loads(self.call("maskfed-server", "finetune", str(file), *arguments))
        return summary

    def call(self, *arguments: str) -> str:
        """Standard output of a command that must succeed."""
        done = subprocess.run(command(*arguments), capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(arguments[:3])}: exit {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout

    def processes(self) -> dict[str, list[psutil.Process]]:
        """Every process of the federation, by program (`flower-superlink`, `flwr-serverapp`, ...)."""
        found: dict[str, list[psutil.Process]] = {}
        for daemon in self.daemons.values():
            try:
                family = [psutil.Process(daemon.pid), *psutil.Process(daemon.pid).children(recursive=True)]
            except psutil.NoSuchProcess:
                continue
            for process in family:
                found.setdefault(program_of(process), []).append(process)
        return found

    def stop(self) -> int:
        """Take everything down, sites first; how many processes were left over afterwards (and killed)."""
        everything = [process for group in self.processes().values() for process in group]
        names = sorted(self.daemons, key=lambda name: name == "coordinator")
        for group in (names[:-1], names[-1:]):
            for name in group:
                self.daemons[name].send_signal(signal.SIGTERM)
            for name in group:
                try:
                    self.daemons[name].wait(STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    self.daemons[name].kill()
        self.daemons.clear()
        _, left = psutil.wait_procs(everything, timeout=8)
        for process in left:
            process.kill()
        return len(left)

    def _daemon(self, name: str, *arguments: str) -> None:
        if name in self.daemons and self.daemons[name].poll() is None:
            return
        # The kernel ends a daemon with us: a benchmark that is killed must not leave a federation behind.
        self.daemons[name] = spawn(command(*arguments), dict(os.environ), self.root / f"{name}.log")
        if name == "coordinator":
            from server.federation.fleet.superlink import superlink_address, wait_ready

            wait_ready(superlink_address(self.home), self.home / "pki" / "ca.crt", 90)


def program_of(process: psutil.Process) -> str:
    """Name of the program that a process runs: the script's, where it is Python."""
    try:
        line = process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return "gone"
    if "deploy.warm" in line[3:5]:  # the parent, or what it has forked: the kernel's name tells
        return process.name()
    for program, module in PROGRAMS.items():
        if module in line[3:5]:
            return program
    names: Sequence[str] = [Path(part).name for part in line[:3]]
    return next(
        (name for name in names if name.startswith(("flower-", "flwr-", "maskfed-"))), names[0] if names else ""
    )


@contextmanager
def federation(
    num_sites: int, image_size: int = 32, num_images: int = 64, *, is_behind_door: bool = False, disk_bytes: int = 0
) -> Iterator[LocalFederation]:
    """A started federation in a temporary folder, on a disk of its own if it has bytes; all ends with the block."""
    with (
        scratch() as folder,
        small_disk(folder, disk_bytes) if disk_bytes else nullcontext(),
    ):
        local = LocalFederation(folder, num_sites, image_size, num_images, is_behind_door)
        try:
            local.set_up()
            local.start()
            yield local
        finally:
            local.stop()


def leftovers(root: Path) -> list[psutil.Process]:
    """Processes that still belong to a federation in `root`."""
    found = []
    for process in psutil.process_iter():
        try:
            text = " ".join(process.cmdline()) + " ".join(process.environ().values())
        except psutil.Error:
            continue
        if str(root) in text:
            found.append(process)
    return found


def tiny_experiment(image_size: int, **federation: float) -> str:
    """TOML text of a fine-tuning that is quick on a CPU; two sites must answer unless `federation` says otherwise."""
    settings = {"rounds": 1, "local_steps": 5, "min_available": 2, "min_replies": 2} | federation
    lines = "".join(f"{name} = {value}\n" for name, value in settings.items())
    return (
        '[train]\nobjective = "dsm"\nbatch = 8\nprecision = "float32"\n'
        f'[model]\nsize = "T"\nimage_size = {image_size}\npatch_size = 4\n[federation]\n{lines}'
    )


def make_experiment(text: str) -> Experiment:
    """An experiment from TOML text."""
    return parse_experiment(text)


def random_checkpoint(folder: Path, experiment: Experiment) -> Path:
    """A freshly initialised model, as a checkpoint to start rounds from."""
    import torch

    from shared.diffusion.uvit import build_model

    torch.manual_seed(0)
    model = build_model(experiment)
    tensors = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    save_checkpoint(folder, {"model": tensors, "ema": tensors}, {"experiment": experiment, "step": 0})
    return folder
