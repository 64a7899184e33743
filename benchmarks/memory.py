"""Peak memory of the ServerApp while 2, 8 and 32 replies of a 25 M model come in at once through the real HTTP grid.

Needed: flat within 10 percent, at most 0.15 GB + 9 x model, no torch. Flower's own FedAvg is measured beside it.
`--fedavg` takes the numbers of replies for that (it keeps them all: 32 need more than 7 GB), `--model` the size.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil

from benchmarks.local import command, program_of
from benchmarks.measure import verdict
from benchmarks.nodes import alias_of, key_of
from benchmarks.scratch import scratch
from deploy.identity.certificates import create_authority
from deploy.identity.request_key import REQUEST_KEY, issue_request_key
from deploy.processes.process import free_ports
from server.federation.fleet.code_bundle import build_bundle
from server.federation.fleet.registry import Registry, write_json
from server.federation.fleet.superlink import Control, wait_ready
from server.federation.starting_point import initial_model
from server.federation.updates.global_model import save_global
from server.runs.run_directory import create
from shared.experiment.config import Experiment, parse_experiment
from shared.messages.agreement.plan import resolve
from shared.messages.signature import public_text
from shared.storage.checkpoint import save_checkpoint
from shared.storage.runlog import read_metrics

NEEDED_FLATNESS = 0.10
FEDAVG_APP = """
import os
import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()

@app.main()
def main(grid, context):
    count, size = int(os.environ["BENCHMARK_NODES"]), int(os.environ["BENCHMARK_SIZE"])
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=count, min_available_nodes=count)
    strategy.start(grid, ArrayRecord({"w": Array(np.zeros(size, np.float32))}), num_rounds=1)
"""


def main(arguments: Sequence[str] = ()) -> int:
    """Print a line for each number of replies, then the verdict."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replies", type=int, nargs="*", default=[2, 8, 32])
    parser.add_argument("--fedavg", type=int, nargs="*", default=[2, 8])
    parser.add_argument("--model", type=float, default=25e6, help="parameters")
    parser.add_argument("--optimizer", default="fedavg", help="fedavg, fedavgm or fedadam")
    options = parser.parse_args(arguments)
    size = int(options.model)
    model_gb, states = 4 * size / 1e9, {"fedavg": 0, "fedavgm": 1, "fedadam": 2}[options.optimizer]
    peaks = []
    for count in options.replies:
        peak, seconds, has_torch = measure(count, size, options.optimizer)
        peaks.append(peak)
        assert not has_torch
        print(f"{count:3d} replies: {peak:.3f} GB = {(peak - 0.15) / model_gb:.2f} x model + 0.15, run {seconds:.1f} s")
    for count in options.fedavg:
        peak, seconds, _ = measure(count, size, "flower")
        print(f"{count:3d} replies, Flower's FedAvg: {peak:.3f} GB, {seconds:.1f} s")
    limit, spread = 0.15 + (9 + states) * model_gb, max(peaks) / min(peaks) - 1
    figure = f"{max(peaks):.2f} GB (limit {limit:.2f}), spread {spread:.1%} (limit {NEEDED_FLATNESS:.0%})"
    return verdict("ServerApp peak RSS", figure, reached=max(peaks) <= limit and spread <= NEEDED_FLATNESS)


def measure(num_nodes: int, size: int, optimizer: str) -> tuple[float, float, bool]:
    """Peak GB of one ServerApp over one round, seconds of the run, and whether it loaded torch."""
    with scratch() as root:
        home = root / "coordinator"
        experiment = make_experiment(num_nodes, optimizer if optimizer != "flower" else "fedavg")
        environment = {"MASKFED_SERVER_HOME": str(home), "BENCHMARK_NODES": str(num_nodes), "BENCHMARK_SIZE": str(size)}
        with superlink(root, num_nodes, environment) as control:
            if optimizer == "flower":
                run_id = submit_fedavg(control)
            else:
                prepare(home, experiment, size, control)
                run_id = control.submit(experiment, "run")
            start = time.monotonic()
            peak, has_torch = watch(control, run_id)
            seconds = time.monotonic() - start
        if optimizer != "flower":
            rounds = [
                event for event in read_metrics(home / "runs" / "run" / "metrics.jsonl") if event["kind"] == "round"
            ]
            assert len(rounds[0]["answered"]) == num_nodes, rounds
        return peak, seconds, has_torch


def make_experiment(num_nodes: int, optimizer: str) -> Experiment:
    """One round in which every node takes part."""
    text = f"[federation]\nrounds = 1\nmin_replies = {num_nodes}\nmin_available = {num_nodes}\n"
    return resolve(parse_experiment(f'{text}server_optimizer = "{optimizer}"\nserver_lr = 0.1\n'))


def prepare(home: Path, experiment: Experiment, size: int, control: Control) -> None:
    """Registry of the nodes that are online, and a run directory whose model is one flat tensor."""
    authority = {"ca_key": home / "ca" / "ca.key", "ca_certificate": home / "pki" / "ca.crt"}
    create_authority(**authority)
    issue_request_key(**authority, path=home / REQUEST_KEY)
    registry = Registry(home / "sites.json")
    for index, node in enumerate(sorted(control.nodes(), key=lambda each: each.node_id)):
        alias = alias_of(node.node_id)
        registry.add(alias, f"ecdsa-sha2-nistp384 {index}", public_text(key_of(alias)))
        registry.set_node_id(alias, node.node_id)
    tensors = {"w": np.random.default_rng(0).normal(size=size).astype(np.float32)}
    source = home / "source"
    save_checkpoint(source, {"model": tensors, "ema": tensors}, {"experiment": experiment, "step": 0})
    made = create(home / "runs" / "run", experiment)
    write_json(made.path / "finetune.json", {})
    save_global(made.round_checkpoint(0), initial_model(source, experiment), experiment)


def submit_fedavg(control: Control) -> int:
    """The same bundle, but with Flower's own strategy as the ServerApp."""
    import hashlib
    import io
    import zipfile

    from flwr.cli.build import build_fab_from_files
    from flwr.common.serde import fab_to_proto
    from flwr.proto.control_pb2 import StartRunRequest
    from flwr.supercore.fab import Fab

    archive = zipfile.ZipFile(io.BytesIO(build_bundle()))
    files: dict[str, bytes | Path] = {name: archive.read(name) for name in archive.namelist() if name[0] != "."}
    content = build_fab_from_files({**files, "server/app.py": FEDAVG_APP.encode()})[0]
    fab = fab_to_proto(Fab(hashlib.sha256(content).hexdigest(), content, {}))
    return int(control._http.StartRun(StartRunRequest(fab=fab)).run_id)


def watch(control: Control, run_id: int) -> tuple[float, bool]:
    """Follow the ServerApp's peak resident memory until its run has ended."""
    peak, has_torch, next_look = 0.0, False, 0.0
    while True:
        for process in psutil.process_iter(["pid", "ppid"]):
            if program_of(process) == "flwr-serverapp" and str(run_id):
                peak, torch_seen = max(peak, peak_rss_gb(process.pid)), maps_torch(process.pid)
                has_torch = has_torch or torch_seen
        if time.monotonic() > next_look:
            state = control.run_state(run_id)
            if state.is_finished:
                assert state.status == "finished:completed", state
                return peak, has_torch
            next_look = time.monotonic() + 0.5
        time.sleep(0.02)


def peak_rss_gb(pid: int) -> float:
    """Highest resident set of a process so far, in GB; 0 when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith("VmHWM")), 0.0)


def maps_torch(pid: int) -> bool:
    """Whether a process has loaded torch's library."""
    try:
        return "libtorch" in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


@contextmanager
def superlink(root: Path, num_nodes: int, environment: dict[str, str]) -> Iterator[Control]:
    """A SuperLink without TLS on loopback, and the stand-in nodes; only for measuring."""
    (port,) = free_ports(1)
    address = f"127.0.0.1:{port}"
    switches = {"FLWR_HOME": str(root / "flwr"), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, **environment, **switches, "PATH": path}
    link = ["--insecure", "--host", "127.0.0.1", "--port", str(port), "--disable-runtime-dependency-installation"]
    nodes = [sys.executable, "-m", "benchmarks.nodes", address, str(num_nodes), "1"]
    with (root / "superlink.log").open("wb") as log:
        started = [subprocess.Popen([*command("flower-superlink"), *link], env=env, stdout=log, stderr=log)]
        try:
            wait_ready(address, None, 90)
            started.append(subprocess.Popen(nodes, env=env, stdout=log, stderr=log))
            with Control(address, None, b"unguarded") as control:
                deadline = time.monotonic() + 180
                while sum(node.status == "online" for node in control.nodes()) < num_nodes:
                    assert time.monotonic() < deadline, "the nodes do not come online"
                    time.sleep(0.5)
                yield control
        finally:
            family = [child for each in started for child in psutil.Process(each.pid).children(recursive=True)]
            for process in reversed(started):
                process.terminate()
            for process in started:
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
            for child in psutil.wait_procs(family, timeout=5)[1]:
                child.kill()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
