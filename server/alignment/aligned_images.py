"""Public images made similar to the sites' by their mean images, as a set that training takes. No torch."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from server.alignment.fit import Alignment, fit
from server.alignment.mean_images import MeanImage
from server.runs.lineage import MeanImageCharge, write_charges
from shared.data.image_set import CACHE_FILE, IMAGES_FILE, INDEX_FILE, SCHEMA_VERSION, ImageCache, open_cache
from shared.data.pixels import DECODING_VERSION
from shared.errors import InputError
from shared.storage.files import write_atomically

CHUNK = 1024


def align_images(
    public: ImageCache,
    means: Sequence[MeanImage],
    charges: Sequence[MeanImageCharge],
    out: Path,
    say: Callable[[str], None] = lambda _: None,
) -> ImageCache:
    """Write every public image once, aligned with one of the sites in turn.

    What sites have released is all that the images know of them, so training on these costs no further privacy.

    Args:
        public: images of the sites' size.
        means: of at least one site.
        charges: what the sites' ledgers were charged for them; it stays with the images and what is trained on them.
        out: new folder of the aligned set.
        say: told what was fitted for each site.

    Raises:
        InputError: mean images of another size, or a folder with content.
    """
    if any(mean.pixels.shape != (3, public.size, public.size) for mean in means):
        raise InputError(
            f"the sites' mean images have {means[0].pixels.shape[-1]} pixels, the public ones {public.size}: "
            "give the experiment that the sites were asked with"
        )
    if out.exists() and any(out.iterdir()):
        raise InputError(f"folder {out} is not empty: name a new one")
    centre = _mean(public)
    alignments = [fit(centre, mean.pixels, mean.deviation) for mean in means]
    for mean, found in zip(means, alignments, strict=True):
        say(f"{mean.site}: {describe(found)}")
    pixels = np.empty((len(public), 3, public.size, public.size), np.uint8)
    for turn, alignment in enumerate(alignments):
        own = np.arange(turn, len(public), len(alignments))
        for start in range(0, len(own), CHUNK):
            rows = own[start : start + CHUNK]
            pixels[rows] = alignment(public.images[rows])
    sites = ", ".join(mean.site for mean in means)
    return _save(out, pixels, charges, f"public images {public.fingerprint[:16]} aligned with {sites}")


def describe(alignment: Alignment) -> str:
    """What was fitted, in words."""
    shift = np.sqrt(np.mean(np.square(alignment.difference)))
    return (
        f"scale {alignment.scale:g}, moved {alignment.down:+.1%} down and {alignment.right:+.1%} right; "
        f"{shift:.3f} root mean square of the difference, smoothed by {alignment.width:.1%} of the side"
    )


def _mean(images: ImageCache) -> NDArray[np.float64]:
    total = np.zeros((3, images.size, images.size))
    for start in range(0, len(images), CHUNK):
        total += images.images[start : start + CHUNK].sum(0, dtype=np.float64)
    return total / len(images) * (2 / 255) - 1


def _save(folder: Path, pixels: NDArray[np.uint8], charges: Sequence[MeanImageCharge], source: str) -> ImageCache:
    """A finished cache, complete when its last file is there, which `open_cache` and every command take."""
    size = pixels.shape[-1]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_charges(folder, charges)
        content = pixels.tobytes()
        digest = hashlib.sha256(content).hexdigest()
        write_atomically(folder / IMAGES_FILE, content)
        write_atomically(folder / INDEX_FILE, json.dumps({"names": [""] * len(pixels), "persons": None}))
        facts = {"schema": SCHEMA_VERSION, "decoding": DECODING_VERSION, "source": source, "fingerprint": digest}
        facts |= {"size": size, "num_images": len(pixels), "num_unreadable": 0, "ignored": {}, "content": digest}
        write_atomically(folder / CACHE_FILE, json.dumps(facts, indent=2) + "\n")
    except OSError as error:
        raise InputError(f"folder {folder}: {error.strerror}; name one that can be written") from error
    return open_cache(folder)
