"""A tiny federation for tests: a coordinator's home, a checkpoint, sites that answer by rule."""

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import RecordDict

from server.app import conduct
from server.federation.fleet.registry import Registry, write_json
from server.federation.messaging.transport import Timing
from server.federation.starting_point import initial_model
from server.federation.updates.global_model import save_global
from server.runs.run_directory import create
from shared.experiment.config import Experiment, parse_experiment
from shared.messages.agreement.plan import resolve
from shared.messages.packing import encode
from shared.messages.training import ReplyHeader, TrainReply, TrainRequest
from shared.seeding import derive_seed
from shared.storage.checkpoint import load_group, save_checkpoint
from shared.storage.runlog import read_metrics
from tests.server.fake_grid import FakeGrid, Site
from tests.signing import federation, public_of

FAST = Timing(
    poll_seconds=0.01,
    patience_seconds=0.3,
    backoff_seconds=0.01,
    max_backoff_seconds=0.05,
    call_deadline_seconds=20.0,
    late_seconds=2.0,
    lost_seconds=0.3,
    offer_seconds=3.0,
    offer_seconds_per_site=0.0,
    absent_grace_seconds=0.1,
    report_seconds=0.2,
)


def make_experiment(**federation: Any) -> Experiment:
    settings = {"rounds": 2, "local_steps": 3, "round_deadline_seconds": 30.0, "available_deadline_seconds": 20.0}
    text = "".join(f"{key} = {_toml(value)}\n" for key, value in (settings | federation).items())
    return resolve(parse_experiment(f"[federation]\n{text}"))


def make_home(folder: Path, experiment: Experiment, num_sites: int = 3, run: str = "run") -> Path:
    """A coordinator's home with registered sites (node ids 100, 101, ...) and a run directory at round 0."""
    home = folder / "home"
    if not (home / "pki").exists():
        shutil.copytree(federation() / "pki", home / "pki")
    registry = Registry(home / "sites.json")
    for index in range(num_sites):
        registry.add(f"site-{index}", f"ecdsa-sha2-nistp384 key{index}", public_of(f"site-{index}"))
        registry.set_node_id(f"site-{index}", 100 + index)
    random = np.random.default_rng(0)
    shapes = {"a.attention.weight": (7, 5), "a.mlp.weight": (3, 4), "b.bias": (11,)}
    tensors = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    source = folder / "source"
    if not source.exists():
        save_checkpoint(source, {"model": tensors, "ema": tensors}, {"experiment": experiment, "step": 1})
    made = create(home / "runs" / run, experiment)
    write_json(made.path / "finetune.json", {})
    save_global(made.round_checkpoint(0), initial_model(source, experiment), experiment)
    return home


def trained(site: str, content: RecordDict, **header: Any) -> RecordDict:
    """The honest answer: a delta that depends on site, run and round only."""
    request = TrainRequest.from_record(content)
    seed = derive_seed(7, site, request.header.run, request.header.server_round)
    delta = np.random.default_rng(seed).normal(scale=0.1, size=request.weights.shape).astype(np.float32)
    return reply(request, delta, **header)


def reply(request: TrainRequest, delta: np.ndarray, /, **header: Any) -> RecordDict:
    facts = {"request_digest": request.digest, "status": "trained", "num_examples": 100, "scalars": {"loss": 0.5}}
    wire = encode(delta, request.header.experiment.federation.wire_dtype)
    return TrainReply(ReplyHeader(**(facts | header)), wire).to_record()


def honest_sites(num_sites: int = 3, **replaced: Callable[[RecordDict, int], Any]) -> dict[int, Site]:
    """Sites by node id; `site_1=answer` replaces the honest answer of site-1."""
    sites = {}
    for index in range(num_sites):
        name = f"site-{index}"
        honest = lambda content, _asked, name=name: trained(name, content)  # noqa: E731
        sites[100 + index] = Site(replaced.get(f"site_{index}", honest))
    return sites


def run_rounds(home: Path, grid: FakeGrid, experiment: Experiment, run: str = "run") -> None:
    conduct(grid, home, run, experiment, FAST)


def rounds_of(home: Path, run: str = "run") -> list[dict[str, Any]]:
    return [event for event in read_metrics(home / "runs" / run / "metrics.jsonl") if event["kind"] == "round"]


def events_of(home: Path, kind: str, run: str = "run") -> list[dict[str, Any]]:
    return [event for event in read_metrics(home / "runs" / run / "metrics.jsonl") if event["kind"] == kind]


def weights_of(home: Path, server_round: int, run: str = "run", group: str = "model") -> dict[str, np.ndarray]:
    return load_group(home / "runs" / run / "checkpoints" / f"round-{server_round:06d}", group)


def same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> bool:
    """Bitwise equality."""
    return ours.keys() == theirs.keys() and all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return str(value)


def permutations_of(count: int) -> list[tuple[int, ...]]:
    return list(itertools.permutations(range(count)))
