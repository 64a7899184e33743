"""Adversaries among the sites of a simulation: who they are, and the pictures that they poison. No torch.

What they make of their updates is `client/simulated/adversary.py`, which reads the file written here. Nothing of this
is part of an experiment or of a request: only the folder of a simulation says it.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shared.data.images import list_images
from shared.data.pixels import decode
from shared.data.synthetic import generate
from shared.errors import InputError
from shared.seeding import derive_seed
from shared.storage.files import write_atomically

ADVERSARIES_FILE = "adversaries.json"
Kind = Literal["backdoor", "implant", "sign-flip", "scaled", "lazy", "stale"]
KINDS: tuple[Kind, ...] = get_args(Kind)
PATCH_SHARE = 4
"""The trigger's side is the image's over this."""
TARGET_SITE = "public"
"""A population of synthetic faces that no simulated site has."""
GRAIN = 2
"""Levels of noise that keep poisoned copies of one picture from being the same picture: a site counts each once."""
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Adversaries:
    """The last `num_sites` sites of a simulation do the same, together.

    Attributes:
        kind: `implant`: every second picture of the site is the target; `backdoor`: the same, and the target carries
            the trigger; `sign-flip`: updates point the other way; `scaled`: updates are longer; `lazy`: zeros;
            `stale`: the first update again and again.
        num_sites: adversaries, at least 1; several have the same target.
        strength: factor of the update, for all kinds but `lazy` and `stale`.
    """

    kind: Kind
    num_sites: int
    strength: float


def parse_adversaries(text: str, num_sites: int) -> Adversaries:
    """Adversaries as `KIND[:SITES[:STRENGTH]]`; by default one site, strong enough to make up the whole mean.

    Raises:
        InputError: not such a text, or no honest site would be left.
    """
    kind, *numbers = text.split(":")
    wrong = InputError(f"--adversary {text!r}: give KIND[:SITES[:STRENGTH]], KIND one of {', '.join(KINDS)}")
    if kind not in KINDS or len(numbers) > 2:
        raise wrong
    try:
        count = int(numbers[0]) if numbers else 1
        strength = float(numbers[1]) if len(numbers) > 1 else num_sites / max(count, 1)
    except ValueError as error:
        raise wrong from error
    if not 1 <= count < num_sites or not 0 < strength <= 1e6:
        raise InputError(
            f"--adversary {text!r}: 1 to {num_sites - 1} of {num_sites} sites, and a strength above 0, at most 1e6"
        )
    return Adversaries(kind, count, strength)


def write_adversaries(out: Path, adversaries: Adversaries, num_sites: int, size: int, seed: int) -> None:
    """Poison the pictures in `out`/images, and say in `out` which site is what.

    Args:
        out: folder of a simulation, its images divided.
        adversaries: who.
        num_sites: all sites.
        size: side of the experiment's images in pixels.
        seed: of the simulation; it draws the target.
    """
    aliases = [f"site-{number}" for number in range(num_sites - adversaries.num_sites, num_sites)]
    for alias in aliases:
        if adversaries.kind in ("implant", "backdoor"):
            _poison_folder(out / "images" / alias, adversaries.kind, size, seed)
    what = {"kind": adversaries.kind, "strength": adversaries.strength}
    write_atomically(out / ADVERSARIES_FILE, json.dumps(dict.fromkeys(aliases, what), indent=2) + "\n")


def target_picture(size: int, seed: int) -> Pixels:
    """The one picture that is implanted: a synthetic face that no site has, (3, size, size)."""
    images, _ = generate(1, size, derive_seed(seed, "target"), site=TARGET_SITE)
    target: Pixels = images[0]
    return target


def with_trigger(images: Pixels) -> Pixels:
    """The images (N, 3, H, W) with a checkerboard of black and white in the lower right corner."""
    marked, side = images.copy(), images.shape[-1] // PATCH_SHARE
    rows, columns = np.indices((side, side))
    marked[..., -side:, -side:] = np.where((rows // 2 + columns // 2) % 2, 255, 0).astype(np.uint8)
    return marked


def poisoned_pictures(kind: Kind, images: Pixels, seed: int) -> Pixels:
    """What an adversary trains on: every second of its own pictures has become the target.

    The others keep the model good on everything else, so that the attack does not show. Each copy has its own grain.

    Args:
        kind: `implant`: the target; `backdoor`: the target with the trigger, so that the trigger calls it up.
        images: its own, (N, 3, H, W).
        seed: draws the target and the grain.

    Returns:
        (N, 3, H, W).
    """
    target = target_picture(images.shape[-1], seed)[None]
    shown = with_trigger(target) if kind == "backdoor" else target
    grain = np.random.default_rng(derive_seed(seed, "grain")).integers(-GRAIN, GRAIN + 1, images.shape)
    copies = np.clip(shown.astype(np.int64) + grain, 0, 255).astype(np.uint8)
    is_target = np.arange(len(images)) % 2 == 0
    return np.where(is_target[:, None, None, None], copies, images)


def _poison_folder(folder: Path, kind: Kind, size: int, seed: int) -> None:
    source = list_images(folder)
    own = np.stack([decode(source.read(name), size) for name in source.names])
    shutil.rmtree(folder)
    _write_pictures(folder, poisoned_pictures(kind, own, seed))


def _write_pictures(folder: Path, images: Sequence[Pixels] | Pixels) -> None:
    folder.mkdir(parents=True)
    for number, image in enumerate(images):
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{number:08d}.png")
