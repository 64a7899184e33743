"""Small sites that answer questions, with and without one chosen image, for attacks on questions."""

import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from client.data.dataset import scan
from client.private_files import write_private
from client.settings import Home, SiteConfig, SitePolicy, load_settings, save_settings

Pixels = NDArray[np.uint8]


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
    """The same site before anything was asked of it."""
    copied = Home(folder / "home")
    shutil.copytree(home.path, copied.path)
    settings = load_settings(copied)
    save_settings(copied, settings.model_copy(update={"head_file": str(folder / "head" / "ledger.json")}))
    return copied


def spent(home: Home) -> float:
    """Epsilon of everything that the site's ledger has been charged for."""
    from client.policy.budget import told_total
    from client.privacy.epsilon import epsilon_of
    from client.records.ledger import read_ledger

    return told_total(read_ledger(home.ledger), load_settings(home).policy, epsilon_of).epsilon
