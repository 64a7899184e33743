"""Sites of a few tiny images on a machine of their own, for attacks on what a site knows of its data."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np

from benchmarks.privacy_attacks.outcome import Outcome
from benchmarks.scratch import scratch
from client.data.dataset import current_id, open_dataset
from client.home import Home
from client.records.data_registry import REGISTRY_VARIABLE
from client.records.ledger import open_ledger
from client.records.spending import Charge, Spending
from client.settings import SiteConfig, save_settings

SIZE = 8
STEPS = 33

Trial = Callable[[Path, np.random.Generator, bool], bool]
"""One attack in a new folder, guarded or not: whether it succeeded."""


@dataclass(frozen=True)
class Site:
    """A home and its settings."""

    home: Home
    settings: SiteConfig

    @classmethod
    def make(cls, folder: Path, photos: Path, **changes: object) -> "Site":
        """A home with settings, not scanned yet; nothing is held out."""
        settings = SiteConfig(
            alias="site",
            address="127.0.0.1:1",
            data=str(photos),
            image_size=SIZE,
            held_out_ratio=0.0,
            head_file=str(folder / "head" / "head.json"),
        )
        site = cls(Home(folder / "home"), settings.model_copy(update=changes))
        save_settings(site.home, site.settings)
        return site

    def spend(self) -> None:
        """A committed charge on the data set in use."""
        data = open_dataset(self.home, self.settings.image_size)
        charge = Charge(
            dataset_id=data.dataset_id,
            fingerprint=data.fingerprint,
            task="train",
            run="run",
            server_round=1,
            request_digest="r",
            plan_digest="p",
            mechanism="dp-sgd",
            noise_multiplier=1.0,
            sample_rate=0.1,
            steps=STEPS,
        )
        with open_ledger(self.home.ledger, Path(self.settings.head_file)) as ledger:
            ledger.commit(ledger.reserve(charge, cap=1e9, delta=1e-5, epsilon_of=num_steps)[0])

    def spent(self) -> float:
        """Steps that the next round on the data in use would find charged."""
        with open_ledger(self.home.ledger, Path(self.settings.head_file)) as ledger:
            return ledger.total(str(current_id(self.home)), 1e-5, num_steps).epsilon


def num_steps(history: list[Spending], delta: float) -> float:
    """A stand-in for the accountant: only whether anything is charged matters here."""
    return float(sum(row.steps for row in history))


def draw(random: np.random.Generator, count: int) -> list[bytes]:
    """Random pictures as uncompressed files."""
    header = b"P6 %d %d 255\n" % (SIZE, SIZE)
    return [header + random.integers(0, 256, 3 * SIZE * SIZE, np.uint8).tobytes() for _ in range(count)]


def file_away(folder: Path, pictures: Mapping[str, bytes]) -> Path:
    """Write pictures under their names below a folder."""
    for name, data in pictures.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def repeat(name: str, trial: Trial, trials: int, is_guarded: bool, seed: int) -> Outcome:
    """Attack again and again; a success is a use of images of which the ledger knows nothing, so epsilon is 0."""
    random, correct = np.random.default_rng(seed), 0
    for _ in range(trials):
        with new_machine() as root:
            correct += trial(root, random, is_guarded)
    return Outcome(name, trials, correct, 0.0)


@contextmanager
def new_machine() -> Iterator[Path]:
    """A temporary folder on a machine that has seen no data yet: its registry is in there, too."""
    with scratch() as root, mock.patch.dict(os.environ, {REGISTRY_VARIABLE: str(root / "registry")}):
        yield root
