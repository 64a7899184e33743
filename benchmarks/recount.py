"""Every sum of a run counted a second time in this process, by the sites' own training and the open sum.

The checkpoint must be the very bits of what the sites that are named as answered give. A round may be given up only
where fewer sites than it needs are left.
"""

from typing import Any

import numpy as np
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
from shared.secure_aggregation.roster import Roster
from shared.storage.runlog import read_metrics
from shared.updates.fixed_point import update_norm
from shared.updates.norm_bound import norm_bound

Update = NDArray[np.float32]


class Recount:
    """Computes sums again; updates of the same weights are trained once."""

    def __init__(self, local: LocalFederation) -> None:
        self._local = local
        self._updates: dict[tuple[str, str], Update] = {}

    def problem(self, run: str, *, may_give_up: bool) -> str:
        """What is wrong with the rounds of a run that has ended; empty: nothing.

        Args:
            run: its name.
            may_give_up: whether so many sites were away that a round without a sum is right.
        """
        folder = RunDir(self._local.home / "runs" / run)
        experiment = load_experiment(folder.path / "experiment.toml")
        rounds = {each["round"]: each for each in read_metrics(folder.metrics) if each["kind"] == "round"}
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
        file = folder.path / FOLDER / ROSTER_FILE
        roster = Roster.model_validate_json(file.read_bytes()) if experiment.federation.secure else None
        header = header_of(before, experiment, folder.path.name, roster)
        bound, total = norm_bound(experiment, len(before.weights)), FixedPointSum(len(before.weights))
        for each in record["answered"]:
            update = self._update(str(each["site"]), TrainRequest(header, before.weights, before.base))
            factor = clip_factor(update_norm(update), bound, experiment.federation)
            total.fold(update, "float32", int(each["weight"]), factor)
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
