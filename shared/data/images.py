"""Pictures as they come: folders and zips, every orientation and colour mode, decoded to square uint8 RGB.

No torch: sites list and decode before training is allowed. Shapes: C = 3 channels, H = W = size pixels.
"""

import hashlib
import os
import struct
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from shared.data.persons import match_identities, persons_by_folder
from shared.errors import InputError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"})
_SIXTEEN_BIT_MODES = frozenset({"I", "I;16", "I;16B", "I;16L"})
# Everything Pillow raises on damaged or hostile files; its own error classes derive from these.
_DECODE_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    SyntaxError,
    EOFError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


class UnreadableImageError(ValueError):
    """A file that looks like an image by name but does not decode."""


@dataclass(frozen=True)
class ImageSource:
    """The image files of a folder or zip, in a fixed order.

    Attributes:
        path: the folder or zip.
        names: file names relative to it with forward slashes, sorted.
        persons: name of the person of each file, its first folder below the common top, or None where a file has none.
        fingerprint: changes when a file is added, removed or rewritten.
        read: bytes of the file with a given name; safe to call from several threads.
    """

    path: Path
    names: tuple[str, ...]
    persons: tuple[str, ...] | None
    fingerprint: str
    read: Callable[[str], bytes]

    @property
    def owners(self) -> tuple[str, ...]:
        """The person of each file; without class folders every file counts as a person of its own."""
        return self.persons or self.names


def list_images(path: Path) -> ImageSource:
    """Find the images below a folder or inside a zip; nothing is decoded.

    Raises:
        InputError: no such path, not a folder or zip, or no image in it.
    """
    if path.is_dir():
        try:
            source = _list_folder(path)
        except OSError as error:
            raise InputError(f"images {path}: {error}; make it readable") from error
    elif path.is_file() and zipfile.is_zipfile(path):
        source = _list_zip(path)
    else:
        problem = "is not a zip file" if path.is_file() else "does not exist"
        raise InputError(f"images {path}: {problem}; give a folder of images or a zip of one")
    if not source.names:
        raise InputError(f"images {path}: no image file in it; known suffixes are {' '.join(sorted(SUFFIXES))}")
    return source


def decode(data: bytes, size: int, crop: int = 0) -> NDArray[np.uint8]:
    """Decode one picture to a square.

    EXIF orientation, centre crop, antialiased bicubic resize; grey becomes RGB, transparency is laid over black, 16 bit
    are cut to 8. Smaller pictures are enlarged.

    Args:
        data: the file.
        size: side of the result in pixels.
        crop: side of the centre crop in pixels of the upright picture, at most its short side; 0: the short side.

    Returns:
        (3, size, size) uint8.

    Raises:
        UnreadableImageError: damaged, cut off, or so large that it could be an attack.
    """
    try:
        with Image.open(BytesIO(data)) as opened:
            # JPEG can decode at a fraction of its size; twice the target leaves the antialiasing to the resize.
            if not crop:
                opened.draft(None, (2 * size, 2 * size))
            upright = ImageOps.exif_transpose(opened)
            picture = to_rgb(upright if upright is not None else opened)
    except _DECODE_ERRORS as error:
        raise unreadable(error) from error
    side = min(picture.size)
    side = min(side, crop) if crop else side
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    square = picture.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))


def shorter_side(data: bytes) -> int:
    """Pixels of a picture's shorter side, from its header alone.

    Raises:
        UnreadableImageError: not an image.
    """
    try:
        with Image.open(BytesIO(data)) as opened:
            return min(opened.size)
    except _DECODE_ERRORS as error:
        raise unreadable(error) from error


def unreadable(error: BaseException) -> UnreadableImageError:
    """What Pillow says, without the addresses of its objects."""
    if isinstance(error, UnidentifiedImageError):
        return UnreadableImageError("not an image of a known format")
    return UnreadableImageError(f"{type(error).__name__}: {error}")


def to_rgb(picture: Image.Image) -> Image.Image:
    """Any mode to RGB: palettes and CMYK converted, alpha over black, 16-bit grey by its high byte."""
    if picture.mode in _SIXTEEN_BIT_MODES:
        high = (np.asarray(picture).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return Image.fromarray(high).convert("RGB")
    if picture.mode in {"RGBA", "LA", "PA", "RGBa", "La"} or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        ground = Image.new("RGBA", layer.size, (0, 0, 0, 255))
        return Image.alpha_composite(ground, layer).convert("RGB")
    return picture.convert("RGB")


def read_identities(path: Path, names: tuple[str, ...]) -> tuple[str, ...]:
    """Persons of `names` from a text file with `<file name> <identity>` lines, as CelebA's `identity_CelebA.txt`.

    Raises:
        InputError: not such a file, files without a line, or lines that disagree about a file.
    """
    try:
        lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"identities {path}: not a text file ({error}); give `<file name> <identity>` lines"
        ) from error
    if bad := next((line for line in lines if len(line) not in (0, 2)), None):
        raise InputError(f"identities {path}: a line has {len(bad)} words; give `<file name> <identity>` lines")
    try:
        return match_identities([(number, line[0], line[1]) for number, line in enumerate(lines, 1) if line], names)
    except InputError as error:
        raise InputError(f"identities {path}: {error}") from error


def _list_folder(path: Path) -> ImageSource:
    found = sorted(_walk(path, "", set()))
    names = tuple(name for name, _, _ in found)
    digest = hashlib.sha256(repr(found).encode()).hexdigest()
    return ImageSource(path, names, persons_by_folder(names), digest, lambda name: (path / name).read_bytes())


def _walk(folder: Path, prefix: str, seen: set[tuple[int, int]]) -> Iterator[tuple[str, int, int]]:
    status = folder.stat()
    # Class folders are often links; a link that leads back up would never end.
    if (status.st_dev, status.st_ino) in seen:
        return
    seen.add((status.st_dev, status.st_ino))
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _walk(Path(entry.path), f"{prefix}{entry.name}/", seen)
            elif _is_image(entry.name) and entry.is_file():
                yield f"{prefix}{entry.name}", entry.stat().st_size, entry.stat().st_mtime_ns


def _list_zip(path: Path) -> ImageSource:
    archive = zipfile.ZipFile(path)
    found = sorted((entry.filename, entry.file_size, entry.CRC) for entry in archive.infolist() if _is_member(entry))
    names = tuple(name for name, _, _ in found)
    digest = hashlib.sha256(repr(found).encode()).hexdigest()
    lock = threading.Lock()

    def read(name: str) -> bytes:
        try:
            with lock:
                return archive.read(name)
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, zlib.error, EOFError) as error:
            raise OSError(f"zip member: {error}") from error

    return ImageSource(path, names, persons_by_folder(names), digest, read)


def _is_member(entry: zipfile.ZipInfo) -> bool:
    parts = PurePosixPath(entry.filename).parts
    is_hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    return not entry.is_dir() and not is_hidden and _is_image(entry.filename)


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in SUFFIXES
