# ruff: noqa: N803, N806
"""Synthetic faces: seeded parametric portraits, so that no photograph of anybody ships with the project.

A person is a row of numbers drawn from (seed, site, index of the person); an image adds pose, expression, light and
backdrop, drawn from (person, index of the image). Image k is therefore the same whatever the number of images asked
for, the machine, the number of threads or the NumPy version. Every site draws from a population of its own, and no two
sites share a person.
"""

import hashlib
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shared.data.portraits import Array, Portraits, render
from shared.errors import InputError

_CHUNK_IMAGES = 32  # planes of one chunk stay in the second-level cache
_PERSONS_PER_SITE = 2**32
_HELDOUT_SITES = 3

_SKIN = np.array([[0.98, 0.83, 0.73], [0.90, 0.69, 0.54], [0.70, 0.48, 0.34], [0.40, 0.26, 0.19]])
_HAIR = np.array(
    [
        [0.07, 0.05, 0.06],
        [0.20, 0.12, 0.08],
        [0.42, 0.25, 0.13],
        [0.62, 0.30, 0.12],
        [0.85, 0.68, 0.38],
        [0.62, 0.62, 0.62],
    ]
)
_IRIS = np.array([[0.20, 0.11, 0.06], [0.36, 0.24, 0.10], [0.25, 0.42, 0.25], [0.24, 0.42, 0.62]])


@dataclass(frozen=True)
class Population:
    """What the persons and pictures of one site have in common; positions are in [0, 1] unless said otherwise."""

    skin: float
    skin_spread: float
    hair: float
    hair_spread: float
    light_x: float
    """Mean direction of the light in [-1, 1], left to right."""
    warmth: float
    """Colour of the light in [-1, 1], blue to orange."""
    backdrop_hue: float
    backdrop_hue_spread: float
    backdrop_saturation: float
    yaw: float
    """Mean turn of the heads in [-1, 1]."""
    long_hair: float
    beard: float
    glasses: float


_PUBLIC = Population(
    skin=0.4,
    skin_spread=0.8,
    hair=0.4,
    hair_spread=0.8,
    light_x=0.0,
    warmth=0.0,
    backdrop_hue=0.6,
    backdrop_hue_spread=0.12,
    backdrop_saturation=0.12,
    yaw=0.0,
    long_hair=0.45,
    beard=0.2,
    glasses=0.12,
)


def population(site: str, person: int = 0) -> Population:
    """The population that `person` of `site` is drawn from.

    Args:
        site: `public` (broad, grey backdrops, light from the front); `site0`, `site1`, ... (narrow, each elsewhere: a
            low-discrepancy sequence spreads them); `heldout` or `heldoutN`, for evaluation, whose persons come in turn
            from the populations of the first 3 or N sites.
        person: index of the person, which matters for `heldout` only.

    Raises:
        InputError: another name.
    """
    kind, number = _parse_site(site)
    if kind == "public":
        return _PUBLIC
    return _shifted(person % number if kind == "heldout" else number)


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
    portraits = _draw(site, seed, index // images_per_person, index % images_per_person)

    def draw(start: int) -> None:
        images[start : start + _CHUNK_IMAGES] = render(portraits.part(start, start + _CHUNK_IMAGES), size)

    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)))) as pool:
        list(pool.map(draw, range(0, num_images, _CHUNK_IMAGES)))
    return images, _site_code(site) * _PERSONS_PER_SITE + index // images_per_person


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


def _parse_site(site: str) -> tuple[str, int]:
    match = re.fullmatch(r"(public)|(site)(\d{1,6})|(heldout)([1-9]\d{0,5})?", site)
    if match is None:
        raise InputError(f"synthetic site {site!r} is unknown: public, heldout, heldoutN, or site0, site1, ...")
    if match[1]:
        return "public", 0
    return ("site", int(match[3])) if match[2] else ("heldout", int(match[5] or _HELDOUT_SITES))


def _site_code(site: str) -> int:
    kind, number = _parse_site(site)
    return {"public": 0, "heldout": 1}.get(kind, 2 + number)


def _shifted(number: int) -> Population:
    # Multiples of the roots of x^(d+1) = x + 1 spread evenly in d dimensions (the R_d sequence of Roberts, 2018).
    ratio = 1.0851
    u = [(0.5 + (number + 1) * ratio ** -(axis + 1)) % 1 for axis in range(8)]
    return Population(
        skin=0.1 + 0.8 * u[0],
        skin_spread=0.5,
        hair=0.05 + 0.85 * u[1],
        hair_spread=0.5,
        light_x=1.2 * u[2] - 0.6,
        warmth=1.4 * u[3] - 0.7,
        backdrop_hue=u[4],
        backdrop_hue_spread=0.3,
        backdrop_saturation=0.3,
        yaw=0.6 * u[5] - 0.3,
        long_hair=0.15 + 0.7 * u[6],
        beard=0.05 + 0.35 * u[7],
        glasses=0.05 + 0.3 * u[0],
    )


def _mix(key_N: NDArray[np.uint64], salt: int) -> NDArray[np.uint64]:
    # splitmix64 (Steele, Lea and Flood, 2014): a counter-based stream, the same in every NumPy.
    z = key_N + np.uint64((salt * 0x9E3779B97F4A7C15) % 2**64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class _Stream:
    """Draws for N keys side by side; the k-th call gives the k-th number of every key."""

    def __init__(self, key_N: NDArray[np.uint64]) -> None:
        self.key_N, self.count = key_N, 0

    def uniform(self, low: float | Array = 0.0, high: float | Array = 1.0) -> Array:
        """Uniform in [low, high), float32 (N,)."""
        self.count += 1
        unit = (_mix(self.key_N, self.count) >> np.uint64(40)).astype(np.float32) / 2**24
        return np.asarray(low + (high - low) * unit, np.float32)

    def bell(self, mean: float | Array = 0.0, spread: float | Array = 1.0) -> Array:
        """Bell-shaped in mean +- spread: the mean of three uniforms, so nothing lies far out."""
        total = self.uniform(-1, 1) + self.uniform(-1, 1) + self.uniform(-1, 1)
        return np.asarray(mean + spread * total / 3, np.float32)


def _draw(site: str, seed: int, person_N: NDArray[np.int64], image_N: NDArray[np.int64]) -> Portraits:
    root = int.from_bytes(hashlib.sha256(f"synthetic faces {seed} {site}".encode()).digest()[:8], "big")
    person_key_N = _mix(person_N.astype(np.uint64) + np.uint64(root), 1)
    who, shot = _Stream(person_key_N), _Stream(_mix(person_key_N + image_N.astype(np.uint64), 2))
    kind, number = _parse_site(site)
    turns = [population(site, person) for person in range(number if kind == "heldout" else 1)]
    pop = {name: np.array([getattr(one, name) for one in turns], np.float32)[person_N % len(turns)] for name in _FIELDS}
    return _portraits(who, shot, pop)


_FIELDS = tuple(Population.__dataclass_fields__)


def _portraits(who: _Stream, shot: _Stream, pop: dict[str, Array]) -> Portraits:
    tone = np.clip(who.bell(pop["skin"], pop["skin_spread"]), 0, 1)
    skin = _palette(_SKIN, tone) * (1 + 0.06 * _stack(who.bell(), who.bell(), who.bell()))
    lip = (
        skin * [0.82, 0.5, 0.5]
        + [0.10, 0.02, 0.04]
        + _stack(who.uniform(0, 0.12), who.bell(0, 0.02), who.bell(0, 0.03))
    )
    is_long = who.uniform() < pop["long_hair"]
    warmth = shot.bell(pop["warmth"], 0.4)
    hue, saturation = (
        shot.bell(pop["backdrop_hue"], pop["backdrop_hue_spread"]),
        shot.bell(pop["backdrop_saturation"], 0.15),
    )
    bright = shot.uniform(0.35, 0.85)
    return Portraits(
        skin=np.asarray(skin, np.float32),
        hair=_palette(_HAIR, np.clip(who.bell(pop["hair"], pop["hair_spread"]), 0, 1)),
        iris=_palette(_IRIS, np.clip(who.bell(1 - tone, 0.5), 0, 1)),
        lip=np.asarray(lip, np.float32),
        clothes=_colour(who.uniform(), who.uniform(0.1, 0.7), who.uniform(0.15, 0.85)),
        head_width=who.bell(0.6, 0.07),
        head_height=who.bell(0.76, 0.06),
        chin=who.uniform(0.1, 0.55),
        eye_size=who.bell(0.145, 0.03),
        eye_gap=who.bell(0.27, 0.035),
        brow_height=who.bell(0.19, 0.035),
        brow_width=who.uniform(0.016, 0.05),
        nose_length=who.bell(0.17, 0.05),
        nose_width=who.uniform(0.06, 0.11),
        mouth_width=who.bell(0.235, 0.06),
        lip_height=who.uniform(0.035, 0.085),
        hairline=who.bell(-0.5, 0.14),
        parting=who.bell(0, 0.17),
        hair_length=np.where(is_long, who.uniform(0.45, 1.0), who.uniform(0.0, 0.12)).astype(np.float32),
        beard=np.asarray((who.uniform() < pop["beard"]) * ~is_long * who.uniform(0.5, 0.95), np.float32),
        glasses=np.asarray(who.uniform() < pop["glasses"], np.float32),
        x=shot.bell(0, 0.05),
        y=shot.bell(0.03, 0.05),
        zoom=shot.bell(1.12, 0.07),
        roll=shot.bell(0, 0.14),
        yaw=shot.bell(pop["yaw"], 0.5),
        pitch=shot.bell(0, 0.6),
        smile=shot.uniform(-0.35, 1.0),
        mouth_open=np.clip(shot.uniform(-1.2, 1.0), 0, 1),
        eye_open=shot.uniform(0.65, 1.2),
        gaze=shot.bell(0, 0.9),
        light_x=shot.bell(pop["light_x"], 0.5),
        light_y=shot.bell(-0.35, 0.3),
        ambient=shot.uniform(0.35, 0.75),
        tint=np.asarray(
            1 + 0.11 * warmth[:, None] * np.array([1.0, 0.1, -1.0]) + shot.bell(0, 0.06)[:, None], np.float32
        ),
        backdrop=_colour(hue, saturation, bright),
        backdrop_end=_colour(hue + shot.bell(0, 0.1), saturation, bright + shot.bell(0, 0.35)),
        backdrop_angle=shot.uniform(0, 2 * np.pi),
    )


def _stack(*parts: Array) -> Array:
    return np.stack(parts, axis=-1)


def _palette(colours: NDArray[np.float64], position_N: Array) -> Array:
    stops = np.linspace(0, 1, len(colours))
    return np.stack([np.interp(position_N, stops, colours[:, c]) for c in range(3)], axis=-1).astype(np.float32)


def _colour(hue_N: Array, saturation_N: Array, value_N: Array) -> Array:
    """HSV to RGB, float32 (N, 3); hue wraps."""
    ramp = np.abs((hue_N[:, None] * 6 + np.array([0.0, 4.0, 2.0])) % 6 - 3) - 1
    s, v = np.clip(saturation_N, 0, 1)[:, None], np.clip(value_N, 0, 1)[:, None]
    return np.asarray(v * (1 - s + s * np.clip(ramp, 0, 1)), np.float32)
