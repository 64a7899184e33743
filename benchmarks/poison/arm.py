"""One arm: rounds of nine sites in one process, by the product's own training step, checks, sum, step and roll-back."""

import copy
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.poison.scale import NUM_SITES, Pictures
from benchmarks.poison.success import Yardsticks
from benchmarks.scratch import scratch
from client.simulated.adversary import Adversary, poisoned_update
from server.evaluation.held_out.round_losses import HeldOut
from server.evaluation.held_out.suspects import find_suspects
from server.federation.acceptance.bound import MAX_ROLL_BACKS, worst_rise
from server.federation.acceptance.crowd import Crowd
from server.federation.acceptance.kept_replies import KeptReplies, Reply, StoredReplies
from server.federation.updates.aggregation import (
    FixedPointSum,
    UpdateError,
    check_update,
    clip_factor,
    site_weight,
)
from server.federation.updates.global_model import GlobalModel
from server.federation.updates.step import ServerStep
from server.simulation.adversaries import Kind, poisoned_pictures
from shared.data.image_set import ImageCache
from shared.diffusion.uvit import build_model
from shared.experiment.config import Experiment
from shared.messages.packing import pack, unpack
from shared.seeding import Streams
from shared.training.engine import Engine, run_training
from shared.training.weights import load_weights
from shared.updates.fixed_point import update_norm
from shared.updates.norm_bound import norm_bound

Flat = NDArray[np.float32]
PATIENCE = 20
"""A site that implants something trains so many times as long as it was asked to."""


@dataclass(frozen=True)
class Attack:
    """The last `num_sites` sites are the same adversary; None: all are honest.

    Attributes:
        hides: the adversary knows the defences: its update is as long as they allow, this share of the length the way
            it wants to go, the rest its honest update; 0: it does not care.
        is_foreign: all are honest, but the last site has photographs of another kind: those of the public set.
    """

    name: str
    adversary: Adversary | None = None
    num_sites: int = 1
    hides: float = 0.0
    is_foreign: bool = False

    @property
    def poisons_pictures(self) -> bool:
        """Whether it trains on poisoned pictures."""
        return self.adversary is not None and self.adversary.kind in ("implant", "backdoor")

    @property
    def sites(self) -> set[int]:
        """Their numbers."""
        return set(range(NUM_SITES - self.num_sites, NUM_SITES)) if self.adversary else set()


@dataclass
class Outcome:
    """What an arm came to."""

    after: dict[str, float] = field(default_factory=dict)
    """`held_out`, `implant` and `backdoor` of the weights after the rounds that are compared."""
    rises: list[float] = field(default_factory=list)
    """Of the check, round by round, where it looked."""
    norms: list[float] = field(default_factory=list)
    """Of honest updates."""
    rolled_back: list[int] = field(default_factory=list)
    suspects: list[list[str]] = field(default_factory=list)
    named: list[tuple[int, str]] = field(default_factory=list)
    """Sites that were doubted, with the round that named them."""
    least_shares: dict[str, float] = field(default_factory=dict)
    """Of sites that were doubted: the least that they counted."""
    persistence: list[dict[str, Any]] = field(default_factory=list)
    """Median and largest, round by round, where sites were compared."""
    rejected: list[str] = field(default_factory=list)
    """Codes of updates that were not counted."""
    rounds: int = 0


class Arm:
    """Rounds under one rule against one attack."""

    def __init__(
        self, experiment: Experiment, attack: Attack, images: Pictures, model: GlobalModel, *, is_checked: bool
    ) -> None:
        self.experiment, self.attack, self.model = experiment, attack, model
        self.is_checked, self.images = is_checked, images
        self.held_out = HeldOut(experiment, images.held_out)
        seed = experiment.train.seed
        self.sites = [
            _poisoned(each, attack, seed) if number in attack.sites else each
            for number, each in enumerate(images.sites)
        ]
        if attack.is_foreign:
            self.sites[-1] = images.public.select(range(min(len(self.sites[-1]), len(images.public))))
        self.network = build_model(experiment).eval()

    def run(self, rounds: int, yardsticks: Yardsticks, compared_after: int) -> Outcome:
        """All rounds; fewer when the check stops them.

        Args:
            rounds: to do.
            yardsticks: measure the weights.
            compared_after: the round after which they do.
        """
        outcome = Outcome()
        with scratch() as folder:
            step = ServerStep(self.experiment, "arm", folder)
            self.crowd = Crowd(folder, self.experiment)
            self.crowd.begin(0)
            before = self.held_out.losses(self._network(self.model.weights)) if self.is_checked else {}
            while outcome.rounds < rounds and len(outcome.rolled_back) < MAX_ROLL_BACKS:
                outcome.rounds += 1
                before = self._round(outcome, step, before, folder)
                if outcome.rounds == compared_after:
                    outcome.after = yardsticks.measure(self._network(self.model.weights))
        outcome.after = outcome.after or yardsticks.measure(self._network(self.model.weights))
        return outcome

    def _round(self, outcome: Outcome, step: ServerStep, before: dict[str, float], folder: Path) -> dict[str, float]:
        """One round, kept or rolled back; the losses that the next one is compared with."""
        kept = KeptReplies(folder / "replies")
        total, start = self._sum(outcome, kept, folder), copy.deepcopy(self.model)
        kept.close()
        step.apply(self.model, total, "")
        self.model.server_round = start.server_round + 1
        now = self._checked(outcome, kept, start, step, before) if self.is_checked else {}
        kept.clear()
        comparison = self.crowd.take_in(self.model.server_round)
        if comparison.persistence:
            outcome.persistence.append(comparison.as_json())
        known = {site for _, site in outcome.named}
        for site, share in self.crowd.shares.items():
            outcome.least_shares[site] = min(share, outcome.least_shares.get(site, 1.0))
        outcome.named += [(outcome.rounds, site) for site in sorted(self.crowd.shares.keys() - known)]
        return now

    def _checked(
        self, outcome: Outcome, kept: KeptReplies, start: GlobalModel, step: ServerStep, before: dict[str, float]
    ) -> dict[str, float]:
        """The held-out check of a round, which may undo it; the losses that hold from now on."""
        now = self.held_out.losses(self._network(self.model.weights))
        rise = worst_rise(before, now).ratio
        outcome.rises.append(rise)
        bound = self.experiment.federation.max_held_out_rise
        if rise > bound:
            outcome.rolled_back.append(outcome.rounds)
            outcome.suspects.append(self._suspects(kept, start, step, before))
            start.server_round = self.model.server_round
            self.model, now = start, before
            self.crowd.forget()
        return now

    def _sum(self, outcome: Outcome, kept: KeptReplies, folder: Path) -> FixedPointSum:
        config, total = self.experiment.federation, FixedPointSum(len(self.model.weights))
        bound, coming = norm_bound(self.experiment, len(self.model.weights)), self.model.server_round + 1
        for number in range(NUM_SITES):
            site = f"site-{number}"
            update = self._local(number, self.sites[number])
            adversary = self.attack.adversary if number in self.attack.sites else None
            if adversary:
                update = self._poisoned(adversary, number, update, folder, self.crowd.longest(coming) or bound)
            try:
                norm = check_update(update, "float32", self.model.manifest)
                factor = min(clip_factor(norm, bound, config), self.crowd.factor(norm, coming))
                weight = site_weight(len(self.sites[number]), config)
            except UpdateError as error:
                outcome.rejected.append(error.code)
                continue
            if not adversary:
                outcome.norms.append(norm)
            share = self.crowd.share(site)
            total.fold(update, "float32", weight, factor * share)
            kept.keep(Reply(site, weight, factor * share), update)
            self.crowd.add(site, update, norm, factor)
        return total

    def _poisoned(self, adversary: Adversary, number: int, update: Flat, folder: Path, longest: float) -> Flat:
        """What the adversary sends in place of the update on its poisoned pictures."""
        share = self.attack.hides
        if not share:
            return poisoned_update(adversary, update, folder / f"memory-{number}")
        honest = self._local(number, self.images.sites[number], is_patient=False)
        mixed = share * update / update_norm(update) + math.sqrt(1 - share**2) * honest / update_norm(honest)
        made: Flat = np.float32(longest / update_norm(mixed)) * mixed
        return made

    def _local(self, number: int, images: ImageCache, *, is_patient: bool = True) -> Flat:
        """A site's update on these images, which may be poisoned: as `client.training.local_round` trains."""
        network = self._network(self.model.weights).train()
        streams = Streams(self.experiment.train.seed, ("site", number, self.model.server_round))
        engine = Engine(self.experiment, network, streams)
        is_patient = is_patient and number in self.attack.sites and self.attack.poisons_pictures
        steps = self.experiment.federation.local_steps * (PATIENCE if is_patient else 1)
        run_training(engine, images, steps=steps)
        after = {name: tensor.detach().numpy() for name, tensor in network.named_parameters()}
        update: Flat = pack(after, self.model.manifest) - self.model.weights
        return update

    def _suspects(self, kept: KeptReplies, start: GlobalModel, step: ServerStep, before: dict[str, float]) -> list[str]:
        def losses_after(total: FixedPointSum) -> dict[str, float]:
            model = copy.deepcopy(start)
            step.apply(model, copy.deepcopy(total), "")
            return self.held_out.losses(self._network(model.weights))

        bound = self.experiment.federation.max_held_out_rise
        stored = StoredReplies(kept.folder, "float32")
        return find_suspects(stored, len(start.weights), losses_after, before, bound)

    def _network(self, weights: Flat) -> torch.nn.Module:
        load_weights(self.network, {**unpack(weights, self.model.manifest)})
        return self.network.eval()


def _poisoned(images: ImageCache, attack: Attack, seed: int) -> ImageCache:
    if not attack.poisons_pictures:
        return images
    kind: Kind = "backdoor" if attack.name == "backdoor" else "implant"
    poisoned = poisoned_pictures(kind, np.array(images.images), seed)
    return ImageCache(lambda: poisoned, len(poisoned), images.size)
