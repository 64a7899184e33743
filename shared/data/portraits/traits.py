# ruff: noqa: N803, N806
"""The numbers behind every face, drawn from counter-based streams: the same on any machine and in any NumPy."""

import hashlib
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.data.portraits.population import Population, parse_site, population

# Always float32; NumPy's stubs lose that in arithmetic with plain floats.
Array = NDArray[Any]

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
_FIELDS = tuple(field.name for field in fields(Population))


@dataclass(frozen=True)
class Portraits:
    """The numbers behind N faces, one entry per face: float32 of shape (N,), colours (N, 3)."""

    # Who it is: lengths in head coordinates.
    skin: Array
    hair: Array
    iris: Array
    lip: Array
    clothes: Array
    head_width: Array
    head_height: Array
    chin: Array
    eye_size: Array
    eye_gap: Array
    brow_height: Array
    brow_width: Array
    nose_length: Array
    nose_width: Array
    mouth_width: Array
    lip_height: Array
    hairline: Array
    parting: Array
    hair_length: Array
    beard: Array
    glasses: Array
    # How the picture was taken.
    x: Array
    y: Array
    zoom: Array
    roll: Array
    yaw: Array
    pitch: Array
    smile: Array
    mouth_open: Array
    eye_open: Array
    gaze: Array
    light_x: Array
    light_y: Array
    ambient: Array
    tint: Array
    backdrop: Array
    backdrop_end: Array
    backdrop_angle: Array

    def __len__(self) -> int:
        return len(self.x)

    def part(self, start: int, stop: int) -> "Portraits":
        """Portraits `start` to `stop` - 1."""
        return Portraits(*(getattr(self, field.name)[start:stop] for field in fields(self)))


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


def draw_portraits(site: str, seed: int, person_N: NDArray[np.int64], image_N: NDArray[np.int64]) -> Portraits:
    """The numbers of N pictures.

    Args:
        site: see `population`.
        seed: of the whole synthetic world.
        person_N: index of the person within the site.
        image_N: index of the picture among the person's.

    Raises:
        InputError: an unknown site.
    """
    root = int.from_bytes(hashlib.sha256(f"synthetic faces {seed} {site}".encode()).digest()[:8], "big")
    person_key_N = _mix(person_N.astype(np.uint64) + np.uint64(root), 1)
    who, shot = _Stream(person_key_N), _Stream(_mix(person_key_N + image_N.astype(np.uint64), 2))
    kind, number = parse_site(site)
    turns = [population(site, person) for person in range(number if kind == "heldout" else 1)]
    pop = {name: np.array([getattr(one, name) for one in turns], np.float32)[person_N % len(turns)] for name in _FIELDS}
    return _portraits(who, shot, pop)


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
