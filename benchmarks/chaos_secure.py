"""What `benchmarks.chaos --secure` adds: sites lost at each stage of a round, and every masked sum counted again.

The sum of the sites that are named as answered is computed a second time in this process, by the sites' own training
and the open sum, and the checkpoint must be its very bits. A round may be given up only where fewer sites than the
threshold are left. Sites keep their keys from run to run: images are drawn by the digest of the request, which has the
roster in it, so that otherwise no two runs would have the same bits.
"""

import json
import random
import time
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from benchmarks.local import LocalFederation
from client.data.dataset import open_dataset
from client.home import Home
from client.settings import load_settings
from client.training.frozen_tensors import frozen_tensors
from client.training.local_round import Round
from server.federation.rounds.request import header_of
from server.federation.rounds.secure_round import FOLDER
from server.federation.secure.rosters import ROSTER_FILE
from server.federation.updates.aggregation import FixedPointSum, clip_factor
from server.federation.updates.global_model import GlobalModel, load_global, round_folder
from server.federation.updates.step import ServerStep
from server.runs.run_directory import RunDir
from shared.experiment.config import Experiment, load_experiment
from shared.messages.training import TrainRequest
from shared.secure_aggregation.roster import Roster, threshold_for
from shared.storage.runlog import read_metrics
from shared.updates.fixed_point import update_norm
from shared.updates.norm_bound import norm_bound

NUM_SITES = 5
MOST_LOST = NUM_SITES - threshold_for(NUM_SITES, 0)
STAGES = ("offering the plan", "training", "unmasking")
"""Of the first round, as the run's progress names them; keys are asked for in the first."""
LOSSES = tuple(f"lose {count} at {stage}" for stage in STAGES for count in range(1, MOST_LOST + 2))
SETTINGS = """secure = true
available_deadline_seconds = 60.0
"""
STAGE_SECONDS = 120.0
AWAY_SECONDS = 90.0
"""How long more sites are away than a sum stands."""
Update = NDArray[np.float32]


def trust_all(local: LocalFederation) -> None:
    """Let every site take up the rosters that the coordinator names: approvals are tried elsewhere."""
    for index in range(local.num_sites):
        file = Home(local.site(index)).settings
        file.write_text(file.read_text(encoding="utf-8").replace('rosters = "approved"', 'rosters = "any"'))


def lose(local: LocalFederation, run: str, target: str, seed: str) -> bool:
    """End some sites with all of their processes when the run comes to a stage; false: it never did.

    As many as a sum stands stay away; more come back, for without them nothing ends.
    """
    count, stage = int(target.split()[1]), target.partition(" at ")[2]
    if not _reached(RunDir(local.home / "runs" / run), stage):
        return False
    for number in random.Random(seed).sample(range(local.num_sites), count):
        site = psutil.Process(local.daemons.pop(f"site-{number}").pid)
        for process in [*site.children(recursive=True), site]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
    if count > MOST_LOST:
        time.sleep(AWAY_SECONDS)
        local.start()
    return True


def _reached(run: RunDir, stage: str) -> bool:
    deadline = time.monotonic() + STAGE_SECONDS
    while time.monotonic() < deadline:
        try:
            if json.loads(run.progress.read_text(encoding="utf-8"))["stage"] == stage:
                return True
        except (OSError, ValueError, KeyError):
            pass
        time.sleep(0.01)
    return False


class Recount:
    """Computes sums again; updates of the same weights are trained once."""

    def __init__(self, local: LocalFederation) -> None:
        self._local = local
        self._updates: dict[tuple[str, str], Update] = {}

    def problem(self, run: str, target: str) -> str:
        """What is wrong with the rounds of a run that has ended; empty: nothing."""
        folder = RunDir(self._local.home / "runs" / run)
        experiment = load_experiment(folder.path / "experiment.toml")
        rounds = {each["round"]: each for each in read_metrics(folder.metrics) if each["kind"] == "round"}
        may_give_up = target.startswith(f"lose {MOST_LOST + 1}")
        for number, record in sorted(rounds.items()):
            if not record["weights_changed"] and not may_give_up:
                return f"round {number} was given up: {record.get('reason')}"
            before, after = (load_global(round_folder(folder.path / "checkpoints", each), experiment)
                             for each in (number - 1, number))  # fmt: skip
            if self._step(before, experiment, folder, record).tobytes() != after.weights.tobytes():
                return f"round {number} is not the sum of {[each['site'] for each in record['answered']]}"
        return ""

    def _step(self, before: GlobalModel, experiment: Experiment, folder: RunDir, record: dict[str, Any]) -> Update:
        if not record["weights_changed"]:
            return before.weights
        roster = Roster.model_validate_json((folder.path / FOLDER / ROSTER_FILE).read_bytes())
        header = header_of(before, experiment, folder.path.name, roster)
        bound, total = norm_bound(experiment, len(before.weights)), FixedPointSum(len(before.weights))
        for each in record["answered"]:
            update = self._update(str(each["site"]), TrainRequest(header, before.weights, before.base))
            total.fold(update, "float32", 1, clip_factor(update_norm(update), bound, experiment.federation))
        ServerStep(experiment, folder.path.name, self._local.home).apply(before, total, "")
        return before.weights

    def _update(self, site: str, request: TrainRequest) -> Update:
        key = site, request.digest
        if key not in self._updates:
            home = Home(self._local.root / site)
            settings = load_settings(home)
            base = frozen_tensors(home, request)
            data = open_dataset(home, settings.image_size)
            self._updates[key], _ = Round(request, base, data, home, settings).run()
        return self._updates[key]
