"""The server's step of a round: the mean of its updates goes through the server optimizer into weights and average."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from server.federation.client_level.mechanism import central_epsilon, central_noise, read_secret
from server.federation.rounds.aggregation import FixedPointSum, update_norm
from server.federation.rounds.global_model import GlobalModel
from server.federation.rounds.server_optimizer import apply_update, average, ema_decay
from shared.experiment.config import Experiment


class ServerStep:
    """What turns a round's sum into new weights, for one run."""

    def __init__(self, experiment: Experiment, run: str, home: Path) -> None:
        self.experiment, self.run, self.home = experiment, run, home
        self.config = experiment.federation

    def apply(self, model: GlobalModel, total: FixedPointSum) -> dict[str, Any]:
        """Change `model` by the round's sum, when there are replies enough; what the round's record says of it."""
        if total.count < self.config.min_replies:
            reason = f"{total.count} usable replies, federation.min_replies asks for {self.config.min_replies}"
            return {"weights_changed": False, "reason": reason, "update_norm": 0.0}
        delta = self._mean(total, model.server_round + 1)
        total.clear()
        norm = update_norm(delta)
        model.weights, model.optimizer = apply_update(model.weights, delta, model.optimizer, self.config)
        model.local_steps += self.config.local_steps
        decay = ema_decay(self.experiment.optim.ema_decay, self.config.local_steps, model.local_steps)
        model.ema = average(model.ema, model.weights, decay)
        return {"weights_changed": True, "update_norm": norm, "ema_decay": decay, **self._spent(model)}

    def _mean(self, total: FixedPointSum, server_round: int) -> NDArray[np.float32]:
        if not self.config.central_noise_multiplier:
            return total.mean(total.total_weight)
        noise = central_noise(read_secret(self.home), self.run, server_round, self.config)
        return total.mean(self.config.sites_per_round, noise)

    def _spent(self, model: GlobalModel) -> dict[str, Any]:
        if not self.config.central_noise_multiplier:
            return {}
        epsilon = central_epsilon(
            self.config.central_noise_multiplier, model.optimizer.steps, self.config.central_delta
        )
        return {"central_epsilon": epsilon, "central_delta": self.config.central_delta, "central_unit": "site"}
