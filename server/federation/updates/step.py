"""The server's step of a round: the mean of its updates goes through the server optimizer into weights and average."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from server.federation.client_level.mechanism import central_epsilon, grid_noise, sensitivity
from server.federation.client_level.release_ledger import CentralLedger, NoiseKeys
from server.federation.updates.aggregation import FixedPointSum
from server.federation.updates.global_model import GlobalModel
from server.federation.updates.server_optimizer import apply_update, average, ema_decay
from shared.errors import InputError
from shared.experiment.config import Experiment
from shared.updates.fixed_point import CLIP_MARGIN, SCALE_BITS, update_norm
from shared.updates.norm_bound import norm_bound

MAX_FIRST_STEP = 10.0
"""Lengths of the mean update that the first step may have: a server optimizer in the wrong unit destroys the weights in
a few rounds, and no later step tells so as plainly."""
AVERAGING = ("fedavg", 1.0)


class ServerStep:
    """What turns a round's sum into new weights, for one run."""

    def __init__(self, experiment: Experiment, run: str, home: Path) -> None:
        self.experiment, self.config = experiment, experiment.federation
        self._ledger = CentralLedger(home)
        self._keys = NoiseKeys(self._ledger, run, home / "runs" / run)

    def apply(self, model: GlobalModel, total: FixedPointSum, inputs: str) -> dict[str, Any]:
        """Change `model` by the round's sum; what the round's record says of it.

        Without client-level DP too few replies change nothing. With it there is always a release, an empty sum's too:
        that there is none would tell who was missing.

        Args:
            model: of the rounds so far.
            total: the round's sum; freed.
            inputs: digest of the request and of the updates in the sum.

        Raises:
            InputError: the first step is far longer than the update.
        """
        if not self.config.central_noise_multiplier and total.count < self.config.min_replies:
            replies = "reply" if total.count == 1 else "replies"
            reason = f"{total.count} usable {replies}, federation.min_replies asks for {self.config.min_replies}"
            return {"weights_changed": False, "reason": reason, "update_norm": 0.0}
        delta = self._mean(total, model.server_round + 1, inputs)
        total.clear()
        norm = update_norm(delta)
        self._update(model, delta, norm)
        model.local_steps += self.config.local_steps
        decay = ema_decay(self.experiment.optim.ema_decay, self.config.local_steps, model.local_steps)
        model.ema = average(model.ema, model.weights, decay)
        return {"weights_changed": True, "update_norm": norm, "ema_decay": decay, **self._spent()}

    def _update(self, model: GlobalModel, delta: NDArray[np.float32], norm: float) -> None:
        """The server optimizer's step; the first one is held against the update that it was made of."""
        is_first = model.optimizer.steps == 0 and (self.config.server_optimizer, self.config.server_step) != AVERAGING
        before = model.weights.copy() if is_first else None
        model.weights, model.optimizer = apply_update(model.weights, delta, model.optimizer, self.config)
        if before is None:
            return
        length = update_norm(model.weights - before)
        if length > MAX_FIRST_STEP * norm:
            raise InputError(
                f"federation.server_lr {self.config.server_lr} makes the first step of {self.config.server_optimizer} "
                f"{length / norm:.3g} times as long as the sites' mean update, at most {MAX_FIRST_STEP:g} times keeps "
                "what they have learnt: lower it, or give 'auto', in a new run"
            )

    def _mean(self, total: FixedPointSum, server_round: int, inputs: str) -> NDArray[np.float32]:
        multiplier = self.config.central_noise_multiplier
        if not multiplier:
            return total.mean(total.total_weight)
        bound = sensitivity(
            norm_bound(self.experiment, total.num_elements), total.num_elements, total.scale_bits, CLIP_MARGIN
        )
        key = self._keys.key(server_round, multiplier, inputs)
        return total.mean(self.config.sites_per_round, grid_noise(key, multiplier * bound, SCALE_BITS))

    def _spent(self) -> dict[str, Any]:
        if not self.config.central_noise_multiplier:
            return {}
        releases = self._ledger.releases()
        epsilon = central_epsilon((release.noise_multiplier for release in releases), self.config.central_delta)
        return {
            "central_epsilon": epsilon,
            "central_delta": self.config.central_delta,
            "central_unit": "site",
            "central_releases": len(releases),
        }
