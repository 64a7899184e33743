"""One file to one square of uint8 RGB, with the colours and the orientation that a viewer shows. No torch.

`DECODING_VERSION` rises whenever the same file may give other pixels; caches of another version are made again.
Shapes: C = 3 channels, H = W = size pixels.
"""

import functools
import struct
import zlib
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageCms, ImageOps, UnidentifiedImageError

from shared.data.formats.misread import (
    DEEP_MODES,
    FORMATS,
    TWELVE_BITS,
    is_inverted,
    lost_depth,
    problem,
    scale_transparent,
)


def register_heif() -> bool:
    """Teach Pillow HEIF where `pillow-heif` is installed."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True


DECODING_VERSION = 5
HAS_HEIF = register_heif()
"""Whether `.heic` and `.heif` can be read: by the extra `heic`."""
_ALPHA_MODES = frozenset({"RGBA", "LA", "PA", "RGBa", "La"})
# Everything Pillow raises on damaged or hostile files; its own error classes derive from these.
DECODE_ERRORS = (
    *(OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, SyntaxError, EOFError, OverflowError),
    *(RuntimeError, struct.error, zlib.error, Image.DecompressionBombError, Image.DecompressionBombWarning),
)
_BYTE, _TWO_BYTES = 255, 65535
_USUAL_GAMMA = 1 / 2.2


class UnreadableImageError(ValueError):
    """A file that looks like an image by name but does not decode."""


def decode(data: bytes, size: int, crop: int = 0) -> NDArray[np.uint8]:
    """Decode one picture to a square.

    EXIF orientation, colours to sRGB by the file's profile, centre crop, antialiased bicubic resize; grey becomes RGB,
    transparency is laid over black, deep files are brought to 8 bits (`to_eight_bits`). Smaller pictures are enlarged.

    Args:
        data: the file.
        size: side of the result in pixels.
        crop: side of the centre crop in pixels of the upright picture, at most its short side; 0: the short side.

    Returns:
        (3, size, size) uint8.

    Raises:
        UnreadableImageError: damaged, cut off, of an unknown range, or so large that it could be an attack.
    """
    try:
        with open_picture(data) as opened:
            _refuse(problem(opened, data))
            # JPEG can decode at a fraction of its size; twice the target leaves the antialiasing to the resize.
            if not crop:
                opened.draft(None, (2 * size, 2 * size))
            upright = ImageOps.exif_transpose(opened)
            picture = to_rgb(upright if upright is not None else opened, is_white_zero=is_inverted(opened))
            _refuse(lost_depth(opened, picture, data))
    except UnreadableImageError:
        raise
    except DECODE_ERRORS as error:
        raise unreadable(error) from error
    side = min(picture.size)
    side = min(side, crop) if crop else side
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    square = picture.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))


def open_picture(data: bytes) -> Image.Image:
    """A picture as Pillow opens it, of the formats in `FORMATS` alone (and HEIF); no pixel of it is decoded yet.

    Raises:
        OSError: and all of `DECODE_ERRORS`; turn them into `unreadable(error)`.
    """
    opened = Image.open(BytesIO(data), formats=(*FORMATS, *(("HEIF",) if HAS_HEIF else ())))
    scale_transparent(opened, data)
    return opened


def _refuse(reason: str) -> None:
    if reason:
        raise UnreadableImageError(reason)


def stored_size(data: bytes) -> tuple[int, int]:
    """Width and height as a picture is stored, before it is turned upright, from its header alone.

    Raises:
        UnreadableImageError: not an image.
    """
    try:
        with open_picture(data) as opened:
            return opened.size
    except DECODE_ERRORS as error:
        raise unreadable(error) from error


def unreadable(error: BaseException) -> UnreadableImageError:
    """What Pillow says, without the addresses of its objects."""
    if isinstance(error, UnidentifiedImageError):
        return UnreadableImageError("not an image of a known format")
    return UnreadableImageError(f"{type(error).__name__}: {error}")


def to_rgb(picture: Image.Image, *, is_white_zero: bool = False) -> Image.Image:
    """Any mode to RGB in sRGB: palettes, CMYK and deep grey converted, profiles applied, alpha over black.

    Args:
        picture: upright.
        is_white_zero: whether the lowest value of deep grey is white.

    Raises:
        UnreadableImageError: a deep file whose range cannot be told.
    """
    info = picture.info
    if picture.mode in DEEP_MODES:
        picture = _deep_grey(picture, is_white_zero)
    has_alpha = picture.mode in _ALPHA_MODES or "transparency" in info
    if picture.mode in ("P", "PA", "RGBa", "La") or (has_alpha and picture.mode != "LA"):
        picture = picture.convert("RGBA" if has_alpha else "RGB")
    alpha = picture.getchannel("A") if has_alpha else None
    colours = picture.convert("L" if picture.mode == "LA" else "RGB") if has_alpha else picture
    # PNG's own word for sRGB stands above its gamma.
    colours = _to_srgb(colours, info.get("icc_profile"), None if "srgb" in info else info.get("gamma"))
    return colours if alpha is None else Image.composite(colours, Image.new("RGB", colours.size), alpha)


def _deep_grey(picture: Image.Image, is_white_zero: bool) -> Image.Image:
    """Mode L; LA where one of the deep values means transparent."""
    values, hidden = np.asarray(picture), picture.info.get("transparency")
    grey = Image.fromarray(to_eight_bits(values))
    grey = ImageChops.invert(grey) if is_white_zero else grey
    if hidden is not None:
        grey.putalpha(Image.fromarray(np.where(values == hidden, 0, _BYTE).astype(np.uint8)))
    return grey


def to_eight_bits(values: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Deep grey to 8 bits by what is in it: nothing that shows something becomes black.

    Integers up to 255 are taken as 8 bits that were stored wide, up to 4095 as the 12 bits of a camera or scanner, up
    to 65535 as 16 bits. Floats in [0, 1] are scaled, above that they are read as integers are.

    Args:
        values: (H, W), integers or floats.

    Returns:
        (H, W) uint8.

    Raises:
        UnreadableImageError: not finite, below 0 or above 65535: then nothing says what black and white are.
    """
    wide = np.asarray(values, np.float64)
    if not wide.size or not np.isfinite(wide).all():
        raise UnreadableImageError("values that are not finite: save it with 8 or 16 bits")
    low, high = float(wide.min()), float(wide.max())
    if low < 0 or high > _TWO_BYTES:
        raise UnreadableImageError(f"values from {low:g} to {high:g}, no known range: save it with 8 or 16 bits")
    if not np.issubdtype(values.dtype, np.integer) and high <= 1:
        return np.asarray(np.rint(wide * _BYTE), np.uint8)
    shift = 0 if high <= _BYTE else 4 if high <= TWELVE_BITS else 8
    return np.asarray(wide.astype(np.int64) >> shift, np.uint8)


def _to_srgb(picture: Image.Image, profile: bytes | None, gamma: float | None) -> Image.Image:
    """RGB as a viewer shows it: by the embedded profile, else by PNG's gamma, else as sRGB."""
    if profile:
        transform = _transform(bytes(profile), picture.mode)
        if transform is not None:
            shown = transform.apply(picture)
            assert isinstance(shown, Image.Image)
            return shown
    elif gamma and abs(gamma / _USUAL_GAMMA - 1) > 0.05:  # PNG, 11.3.2.2: differences below are noise
        return picture.convert("RGB").point(_gamma_table(float(gamma)) * 3)
    return picture.convert("RGB")


@functools.lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """LittleCMS from a profile to sRGB; None where the profile is damaged or of other channels: viewers ignore it."""
    if mode not in ("RGB", "L", "CMYK", "LAB"):
        return None
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        intent = ImageCms.Intent(ImageCms.getDefaultIntent(source))
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB", intent)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


@functools.lru_cache(maxsize=32)
def _gamma_table(gamma: float) -> list[int]:
    """Samples of a PNG with this gAMA, linear light being sample^(1/gamma), as sRGB samples (IEC 61966-2-1)."""
    linear = (np.arange(256) / 255) ** (1 / min(max(gamma, 0.01), 100.0))
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return [int(value) for value in np.rint(255 * srgb)]
