"""What all sites' updates say of each one: how long it may be, and whether one site keeps pulling its own way.

Memory: 64 KB a site, whatever the model's size; updates are read once, as they arrive, in any order. What is remembered
lies in the run's folder, mode 0600, one file a round, so that a round which is repeated comes to the same. Neither goes
with masked sums, of which nobody sees one update, nor with client-level DP, where a name would be a release.
"""

import json
import logging
import os
from dataclasses import astuple, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from server.federation.acceptance.persistence import LEAST_SITES, Comparison, Course, compare, deviations
from server.federation.acceptance.sketches import KEY_BYTES, SKETCH_SIZE, Sketch, sketch
from server.federation.acceptance.trust import trusted
from shared.experiment.config import Experiment, Section
from shared.experiment.federation import FederationConfig
from shared.experiment.learning_rate import round_lr
from shared.storage.files import write_atomically
from shared.updates.fixed_point import clipping

FOLDER, KEY_FILE, ROUND_FILE = "crowd", "key", "round-{:06d}.safetensors"
MAX_NORM_RATIO, MAX_PERSISTENCE = 1.25, 0.1
"""What `auto` stands for."""
log = logging.getLogger("maskfed.server")


@dataclass(frozen=True)
class Norms:
    """The median norm of a round's updates; 0: none is known."""

    middle: float = 0.0
    server_round: int = 0


class _Remembered(Section):
    """What a round's file holds next to the sketches."""

    norms: tuple[Annotated[float, Field(ge=0)], Annotated[int, Field(ge=0)]]
    courses: dict[str, tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)], Annotated[int, Field(ge=1)]]]
    shares: dict[str, Annotated[float, Field(gt=0, le=1)]]


class Crowd:
    """The sites of one run, compared with one another."""

    def __init__(self, run_folder: Path, experiment: Experiment) -> None:
        self.run_folder, self.folder, self.experiment = run_folder, run_folder / FOLDER, experiment
        config = experiment.federation
        self.max_ratio = _number(config.max_norm_ratio, MAX_NORM_RATIO, config)
        self.max_persistence = _number(config.max_persistence, MAX_PERSISTENCE, config)
        self._key = b""
        self._courses: dict[str, Course] = {}
        self._norms = Norms()
        self.shares: dict[str, float] = {}
        """Of sites that are doubted: what their updates are multiplied by, next to what bounds their length."""
        self._sketches_here: dict[str, Sketch] = {}
        self._norms_here: list[float] = []

    @property
    def is_on(self) -> bool:
        """Whether single updates are looked at."""
        return bool(self.max_ratio or self.max_persistence)

    def begin(self, server_round: int) -> None:
        """Take up what is known after `server_round` rounds."""
        self.forget()
        self._courses, self._norms, self.shares = {}, Norms(), {}
        if self.is_on:
            self._key = self._read_key()
            if server_round:
                self._read(self.folder / ROUND_FILE.format(server_round))

    def factor(self, norm: float, server_round: int) -> float:
        """What an update of this norm is multiplied by, so that it is at most `longest`."""
        return clipping(norm, self.longest(server_round))

    def longest(self, server_round: int) -> float:
        """Largest norm in this round; 0: none is known.

        It is `max_norm_ratio` times the median of the sites' norms a round before, which a minority cannot move out of
        the honest ones' range, times what the learning rates have become since then.
        """
        before = self._rates(self._norms.server_round)
        if not (self.max_ratio and before):
            return 0.0
        return self.max_ratio * self._norms.middle * self._rates(server_round) / before

    def _rates(self, server_round: int) -> float:
        return sum(map(round_lr(self.experiment, max(1, server_round)), range(self.experiment.federation.local_steps)))

    def add(self, site: str, wire: NDArray[Any], norm: float, factor: float) -> None:
        """Look at a good update as it arrives; `norm` is its own, `factor` what the bounds of its length make of it."""
        self._norms_here.append(norm)
        if self.max_persistence:
            self._sketches_here[site] = sketch(self._key, wire, self.experiment.federation.wire_dtype, factor)

    def forget(self) -> None:
        """Drop the round: it is undone, or asked again."""
        self._sketches_here, self._norms_here = {}, []

    def share(self, site: str) -> float:
        """What an update of this site counts: 1, or less where it is doubted and the operator does not trust it."""
        if site not in self.shares or site in trusted(self.run_folder):
            return 1.0
        return self.shares[site]

    def take_in(self, server_round: int) -> Comparison:
        """Remember the round, durably, and compare its sites; an undone round was forgotten and compares nobody.

        Who was doubted and is not compared now, for it did not answer, stays doubted.
        """
        comparison = Comparison({})
        if len(self._norms_here) >= LEAST_SITES:
            self._norms = Norms(median(self._norms_here), server_round)
        if len(self._sketches_here) >= LEAST_SITES:
            for site, deviation in deviations(self._sketches_here).items():
                self._courses[site] = self._courses.get(site, Course(np.zeros(SKETCH_SIZE))).after(deviation)
            comparison = compare(self._courses, self._sketches_here)
            away = {site: share for site, share in self.shares.items() if site not in comparison.persistence}
            self.shares = away | comparison.shares(self.max_persistence)
        self.forget()
        self._write(server_round)
        return comparison

    def _write(self, server_round: int) -> None:
        """What is known after `server_round` rounds, to disk, before the round's checkpoint.

        The file of the round before stays: a crash may cost this round its checkpoint.
        """
        if not self.is_on:
            return
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = {site: [each.square, each.length, each.rounds] for site, each in sorted(self._courses.items())}
        meta = {
            name: json.dumps(value)
            for name, value in (("norms", astuple(self._norms)), ("courses", facts), ("shares", self.shares))
        }
        data = save({site: each.total for site, each in self._courses.items()}, meta)
        write_atomically(self.folder / ROUND_FILE.format(server_round), data, 0o600)
        for old in self.folder.glob("round-*"):
            if old.name not in {ROUND_FILE.format(number) for number in (server_round - 1, server_round)}:
                old.unlink()

    def _read(self, file: Path) -> None:
        try:
            with safe_open(file, "numpy") as stored:
                meta = stored.metadata()
                facts = _Remembered.model_validate({name: json.loads(meta[name]) for name in _Remembered.model_fields})
                totals = {site: stored.get_tensor(site) for site in facts.courses}
            if any(each.shape != (SKETCH_SIZE,) or not np.isfinite(each).all() for each in totals.values()):
                raise ValueError
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError):
            log.warning("%s is missing or damaged: sites are compared anew from here on", file)
            return
        self._courses = {site: Course(totals[site], *each) for site, each in facts.courses.items()}
        self._norms, self.shares = Norms(*facts.norms), dict(facts.shares)

    def _read_key(self) -> bytes:
        """The run's secret, drawn when it begins; what was remembered under another one is of no use."""
        file = self.folder / KEY_FILE
        key = file.read_bytes() if file.exists() else b""
        if len(key) != KEY_BYTES:
            key = os.urandom(KEY_BYTES)
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for old in self.folder.glob("round-*"):
                old.unlink()
            write_atomically(file, key, 0o600)
        return key


def _number(value: float | Literal["auto"], default: float, config: FederationConfig) -> float:
    if value == "auto":
        return 0.0 if config.secure or config.central_noise_multiplier else default
    return value
