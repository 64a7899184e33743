"""Numbers and names as text for people: page, card, tables."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape


def format_number(value: float | str | None) -> str:
    """Four significant digits; text stays, None becomes a dash."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 10_000 or value == int(value) else f"{value:.4g}"


def format_bytes(value: float) -> str:
    """With a decimal unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000 or unit == "GB":
            return f"{value:.3g} {unit}" if unit != "B" else f"{value:.0f} B"
        value /= 1000
    raise AssertionError("the last unit has returned")


def format_seconds(value: float | None) -> str:
    """Seconds below two minutes, else minutes or hours."""
    if value is None or not math.isfinite(value):
        return "–"
    if value < 120:
        return f"{value:.1f} s"
    return f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h"


def format_interval(interval: list[float] | None) -> str:
    """Both ends of a 95 percent interval; a dash where none was asked for."""
    return "–" if interval is None else f"{format_number(interval[0])} to {format_number(interval[1])}"


def reference_label(reference: Mapping[str, Any], names_sites: bool = True) -> str:
    """What a distance was measured against, without the folders of the machine that measured it.

    Args:
        reference: as in `result.json`.
        names_sites: whether sites are named, not only counted.
    """
    if reference.get("release", "own") == "own":
        name = str(reference["name"])
        return name if name.startswith("synthetic:") else ", ".join(Path(part).name for part in name.split(","))
    sites = str(reference.get("sites", "")).split("+")
    who = ", ".join(sites) if len(sites) <= 3 and names_sites else f"{len(sites)} site{'s' if len(sites) != 1 else ''}"
    return f"{'exact' if reference['release'] == 'exact' else 'private (DP)'} statistics of {who}"


def breakable(name: str) -> Markup:
    """A long name that a narrow column may break after a separator, and only there."""
    # The parts are escaped, and what joins them is ours.
    return Markup("<wbr>").join(escape(part) for part in re.split(r"(?<=[_:/.])", name))
