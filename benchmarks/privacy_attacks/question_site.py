"""Small sites that answer questions, with and without one chosen image, for attacks on questions."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from unittest import mock

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from client.data.dataset import open_dataset, scan
from client.home import Home
from client.policy.budget import told_total
from client.privacy.accounting import epsilon
from client.privacy.epsilon import epsilon_of
from client.private_files import write_private
from client.records.data_registry import registry_folder
from client.records.ledger import open_ledger, read_ledger
from client.records.spending import Charge, Spending
from client.settings import SiteConfig, SitePolicy, load_settings, save_settings

Pixels = NDArray[np.uint8]
RUN = "run"
"""The training run whose models are audited."""


def make_site(folder: Path, images: Pixels, policy: SitePolicy, held_out_ratio: float = 0.0) -> Home:
    """A scanned site whose photographs are `images`, uint8 (N, 3, S, S); its key is fixed, so its split is, too."""
    photos = folder / "photos"
    photos.mkdir(parents=True)
    for number, image in enumerate(images):
        Image.fromarray(image.transpose(1, 2, 0)).save(photos / f"{number:04d}.png")
    home = Home(folder / "home")
    settings = SiteConfig(
        alias="site", address="127.0.0.1:1", data=str(photos), image_size=images.shape[-1], device="cpu",
        held_out_ratio=held_out_ratio, head_file=str(folder / "head" / "ledger.json"), policy=policy,
    )  # fmt: skip
    save_settings(home, settings)
    write_private(home.data_key, bytes(32))
    scan(home, settings)
    return home


def fresh_copy(home: Home, folder: Path) -> Home:
    """The same site before anything was asked of it, on a machine that knows of no other copy's charges."""
    copied = Home(folder / "home")
    shutil.copytree(home.path, copied.path)
    for file in [*registry_folder().glob("*.charges"), *registry_folder().glob("*.head")]:
        file.unlink()
    settings = load_settings(copied)
    save_settings(copied, settings.model_copy(update={"head_file": str(folder / "head" / "ledger.json")}))
    return copied


@contextmanager
def computed_once() -> Iterator[None]:
    """Hundreds of trials at little cost: an epsilon is computed once per history, and no network gets a random start.

    Neither changes what a site does: every tensor of a network is that of the request.
    """

    @cache
    def of(history: tuple[Spending, ...], delta: float) -> float:
        return epsilon(history, delta)

    with (
        mock.patch("client.privacy.accounting.epsilon", lambda history, delta: of(tuple(history), delta)),
        mock.patch("torch.nn.init.trunc_normal_", lambda tensor, **_: tensor),
    ):
        yield


def commit_round(home: Home) -> None:
    """A completed DP round of `RUN` at almost no cost: only runs that the site took part in are audited."""
    settings = load_settings(home)
    data = open_dataset(home, settings.image_size)
    charge = Charge(
        dataset_id=data.dataset_id, fingerprint=data.fingerprint, task="train", run=RUN, server_round=1,
        request_digest="r", plan_digest="p", mechanism="dp-sgd", noise_multiplier=1000.0, sample_rate=0.01, steps=1,
        unit="image",
    )  # fmt: skip
    with open_ledger(home.ledger, Path(settings.head_file)) as ledger:
        ledger.commit(ledger.reserve(charge, cap=1.0, delta=1e-5, epsilon_of=lambda *_: 0.0)[0])


def spent(home: Home) -> float:
    """Epsilon of everything that the site's ledger has been charged for."""
    return told_total(read_ledger(home.ledger), load_settings(home).policy, epsilon_of).epsilon
