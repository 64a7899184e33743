"""Who lives where: the population that each synthetic site draws its persons and pictures from."""

import re
from dataclasses import dataclass

from shared.errors import InputError

_HELDOUT_SITES = 3


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
    kind, number = parse_site(site)
    if kind == "public":
        return _PUBLIC
    return _shifted(person % number if kind == "heldout" else number)


def parse_site(site: str) -> tuple[str, int]:
    """Kind (`public`, `site` or `heldout`) and number of a synthetic site.

    Raises:
        InputError: another name.
    """
    match = re.fullmatch(r"(public)|(site)(\d{1,6})|(heldout)([1-9]\d{0,5})?", site)
    if match is None:
        raise InputError(f"synthetic site {site!r} is unknown: public, heldout, heldoutN, or site0, site1, ...")
    if match[1]:
        return "public", 0
    return ("site", int(match[3])) if match[2] else ("heldout", int(match[5] or _HELDOUT_SITES))


def site_code(site: str) -> int:
    """A number that no other site has."""
    kind, number = parse_site(site)
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
