"""Synthetic faces: seeded parametric portraits, so that no photograph of anybody ships with the project.

A person is a row of numbers drawn from (seed, site, index of the person); an image adds pose, expression, light and
backdrop, drawn from (person, index of the image). Image k is therefore the same whatever the number of images asked
for, the machine, the number of threads or the NumPy version. Every site draws from a population of its own, and no two
sites share a person.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shared.data.portraits.population import site_code
from shared.data.portraits.rendering import render
from shared.data.portraits.traits import draw_portraits
from shared.errors import InputError

_CHUNK_IMAGES = 32  # planes of one chunk stay in the second-level cache
_PERSONS_PER_SITE = 2**32


def generate(
    num_images: int, size: int, seed: int, *, site: str = "public", images_per_person: int = 4
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Draw the first `num_images` images of a site.

    Args:
        num_images: N; 0 is allowed.
        size: height and width S in pixels, at least 8.
        seed: of the whole synthetic world: same seed, same persons.
        site: see `population`.
        images_per_person: consecutive images that show the same person.

    Returns:
        Images uint8 (N, 3, S, S), and persons int64 (N,), ids that no two sites share.

    Raises:
        InputError: a number out of range or an unknown site.
    """
    limits = (("num_images", num_images, 0), ("size", size, 8), ("images_per_person", images_per_person, 1))
    for name, value, least in limits:
        if value < least:
            raise InputError(f"synthetic faces: {name} {value} is below {least}: raise it")
    images = np.empty((num_images, 3, size, size), np.uint8)
    index = np.arange(num_images)
    portraits = draw_portraits(site, seed, index // images_per_person, index % images_per_person)

    def draw(start: int) -> None:
        images[start : start + _CHUNK_IMAGES] = render(portraits.part(start, start + _CHUNK_IMAGES), size)

    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)))) as pool:
        list(pool.map(draw, range(0, num_images, _CHUNK_IMAGES)))
    return images, site_code(site) * _PERSONS_PER_SITE + index // images_per_person


def write_folder(
    path: Path, num_images: int, size: int, seed: int, *, site: str = "public", images_per_person: int = 4
) -> None:
    """Write the images of `generate` as `<path>/<person>/<k>.png`.

    Raises:
        InputError: as `generate`, or a folder that already has content.
    """
    if path.exists() and any(path.iterdir()):
        raise InputError(f"folder {path} is not empty: name a new one")
    images, persons = generate(num_images, size, seed, site=site, images_per_person=images_per_person)
    for number, (image, person) in enumerate(zip(images, persons, strict=True)):
        folder = path / f"{person:012d}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{number % images_per_person:03d}.png")
