"""Pictures that Pillow would read as others than their files hold, found by header and tags. No torch."""

import struct
from typing import Any

import numpy as np
from PIL import Image, ImageSequence, features

FORMATS = (
    *("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM"),
    *(("AVIF",) if features.check("avif") else ()),
    *(("JPEG2000",) if features.check("jpg_2000") else ()),
)
"""What a picture may be, whatever its suffix says. Pillow knows many more: some have no mark of their own, so that any
noise is one, and PostScript is run by another program."""
DEEP_MODES = frozenset({"I", "F", "I;16", "I;16B", "I;16L", "I;16N"})
TWELVE_BITS = 4095
_BITS_PER_SAMPLE, _PHOTOMETRIC, _PLANES, _WHITE_IS_ZERO, _APART = 258, 262, 284, 0, 2  # TIFF tags and values
_SRGB_PRIMARIES = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
_SRGB_CODE = (1, 13)
"""Primaries and transfer of sRGB in ITU-T H.273, which PNG's cICP names colours by."""
_NOISE = 0.01
"""Chromaticities nearer than this are the same."""


def problem(opened: Image.Image, data: bytes) -> str:
    """Why the pixels would be others than a viewer shows; an empty text where nothing speaks for it.

    Several pages, a palette without colours, deep colours in planes or partly transparent, and colours that a PNG
    describes in another way than by a profile.
    """
    if opened.format == "TIFF" and (pages := _pages(opened)) > 1:
        return f"{pages} pages of one size: save each page as a file of its own"
    if opened.format == "PNG" and opened.mode == "P" and b"PLTE" not in data:
        return "a palette picture without its palette: save it again"
    if opened.format == "PNG" and _has_other_colours(opened, data):
        return "its colours are described without a profile (cICP, cHRM): save it as sRGB or with an ICC profile"
    if not _has_deep_colours(opened, data):
        return ""
    if opened.format == "TIFF" and opened.tag_v2.get(_PLANES) == _APART:  # type: ignore[attr-defined]
        return "16 bits per channel in separate planes: save it with 8 bits, or interleaved"
    return "16 bits per channel and a transparent colour: save it with 8 bits" if "transparency" in opened.info else ""


def lost_depth(opened: Image.Image, shown: Image.Image, data: bytes) -> str:
    """Why Pillow's high bytes of deep colours leave next to nothing: 16 bits hold 8 or 12; empty where they do not."""
    extrema: Any = shown.getextrema()  # one pair per channel
    if _has_deep_colours(opened, data) and max(high for _, high in extrema) <= TWELVE_BITS >> 8:
        return "16 bits per channel hold 12 or fewer, which shows black: save it with 8 bits"
    return ""


def is_inverted(opened: Image.Image) -> bool:
    """Whether white is the lowest value of deep grey, which Pillow turns round in files of 8 bits only."""
    is_deep = opened.format == "TIFF" and opened.mode in DEEP_MODES
    return is_deep and opened.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO  # type: ignore[attr-defined]


def scale_transparent(opened: Image.Image, data: bytes) -> None:
    """Bring the transparent value of a grey PNG of 2 or 4 bits to the 8 bits that Pillow gives its pixels."""
    hidden = opened.info.get("transparency")
    if opened.format == "PNG" and opened.mode == "L" and isinstance(hidden, int):
        highest = 2 ** _bits(opened, data) - 1
        opened.info["transparency"] = (hidden & highest) * 255 // highest


def _has_other_colours(opened: Image.Image, data: bytes) -> bool:
    """Whether a PNG says by numbers alone that its colours are not those of sRGB (PNG, third edition, 11.3.2)."""
    code = _chunk(data, b"cICP")
    if code:
        return tuple(code[:2]) != _SRGB_CODE
    info = opened.info
    # Without a gamma viewers do not look at the primaries.
    if "icc_profile" in info or "srgb" in info or not {"chromaticity", "gamma"} <= info.keys():
        return False
    return any(abs(one - own) > _NOISE for one, own in zip(info["chromaticity"], _SRGB_PRIMARIES, strict=True))


def _chunk(data: bytes, kind: bytes) -> bytes:
    """Content of a PNG's chunk before its pixels; empty where there is none."""
    place = 8
    while place + 8 <= len(data):
        length, name = struct.unpack(">I4s", data[place : place + 8])
        if name in (kind, b"IDAT"):
            return data[place + 8 : place + 8 + length] if name == kind else b""
        place += 12 + length
    return b""


def _pages(opened: Image.Image) -> int:
    """Pages of a scan; smaller ones are previews of the first."""
    sizes = [page.size for page in ImageSequence.Iterator(opened)]
    opened.seek(0)
    return sizes.count(sizes[0])


def _has_deep_colours(opened: Image.Image, data: bytes) -> bool:
    return opened.mode not in DEEP_MODES and _bits(opened, data) > 8


def _bits(opened: Image.Image, data: bytes) -> int:
    """Bits per sample, as the file's header says."""
    if opened.format == "PNG":
        return data[24]
    if opened.format == "TIFF":
        return int(np.max(opened.tag_v2.get(_BITS_PER_SAMPLE, 8)))  # type: ignore[attr-defined]
    return 8
