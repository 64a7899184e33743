# ruff: noqa: N803, N806 - shape suffixes
"""What is kept of the files of a scan: HMACs under the site's key and the machine's. No torch.

Of a file its bytes, of a picture its pixels at the scanned size and its samples: those that stand in the file, whatever
program has packed them, with which profile, and turned or mirrored in which way. So a copy without loss is known.
"""

import errno
import hashlib
import os
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from client.data.held_out import Picture, recorder
from shared.data.image_set import ImageCache
from shared.data.images import ImageSource
from shared.data.pixels import DECODE_ERRORS, UnreadableImageError, open_picture, stored_size, to_rgb, unreadable
from shared.errors import InputError

MOST_THREADS, AT_ONCE = 4, 64
"""Whole pictures are in memory while they are looked at; files that are begun before the first of them is done."""
_SAMPLES = b"samples "
Recorder = Callable[[bytes], str]


@dataclass
class Seen:
    """Records of the files of a scan; those of pictures in one order."""

    pictures: list[Picture] = field(default_factory=list)
    """Of files that decode, under the site's key."""
    machine_records: list[tuple[str, ...]] = field(default_factory=list)
    """The same under the machine's key."""
    files: list[str] = field(default_factory=list)
    """Bytes of every file, also of those that do not decode, under the site's key."""
    machine_files: list[str] = field(default_factory=list)
    sides: list[int] = field(default_factory=list)
    """Shorter side of each picture as it is in its file, in pixels."""


class _File(NamedTuple):
    own: str
    machine: str
    """Record of the bytes under the site's key, and under the machine's."""
    side: int
    """Shorter side of the picture; 0 for a file that did not decode."""
    samples: bytes
    """Digest; empty where they cannot be read."""


def look(
    source: ImageSource, images: ImageCache, persons: tuple[str, ...] | None, key: bytes, machine_key: bytes
) -> Seen:
    """Read every file once and keep what later scans, and other homes, need to know it again.

    Args:
        source: the files.
        images: those of them that were decoded.
        persons: of each file of `source`, or None.
        key: the site's.
        machine_key: the registry's.

    Raises:
        InputError: the machine could not read a file: its picture would be left out, and nobody would know it again.
    """
    own, machine = recorder(key), recorder(machine_key)
    row_of = {name: row for row, name in enumerate(images.names)}
    seen = Seen()
    for number, (name, file) in enumerate(zip(source.names, _files(source, row_of, own, machine), strict=True)):
        if file is None:
            continue
        seen.files.append(file.own)
        seen.machine_files.append(file.machine)
        if name in row_of:
            looks = [images.images[row_of[name]].tobytes(), *([_SAMPLES + file.samples] if file.samples else [])]
            person = None if persons is None else own(persons[number].encode(errors="surrogateescape"))
            seen.pictures.append(Picture(row_of[name], (file.own, *map(own, looks)), person))
            seen.machine_records.append((file.machine, *map(machine, looks)))
            seen.sides.append(file.side)
    return seen


def _files(source: ImageSource, decoded: Collection[str], own: Recorder, machine: Recorder) -> Iterator[_File | None]:
    """All files in order, several looked at side by side; None for a member of an archive that is damaged."""

    def read(name: str) -> _File | None:
        try:
            data = source.read(name)
            side, samples = (min(stored_size(data)), _samples(data)) if name in decoded else (0, b"")
            return _File(own(data), machine(data), side, samples)
        except UnreadableImageError:
            return None
        except (OSError, MemoryError) as error:
            reason = os.strerror(errno.ENOMEM) if isinstance(error, MemoryError) else error.strerror or error
            raise InputError(f"images {source.path}: {name}: {reason}; cure it, then scan again") from error

    with ThreadPoolExecutor(min(MOST_THREADS, len(os.sched_getaffinity(0)))) as pool:
        for start in range(0, len(source.names), AT_ONCE):
            yield from pool.map(read, source.names[start : start + AT_ONCE])


def _samples(data: bytes) -> bytes:
    try:
        return samples_digest(data)
    except UnreadableImageError:
        return b""


def samples_digest(data: bytes) -> bytes:
    """SHA-256 of the samples of a picture: the same for each lossless format, profile, quarter turn and mirror image.

    Args:
        data: the file.

    Raises:
        UnreadableImageError: it cannot be decoded.
    """
    try:
        with open_picture(data) as opened:
            opened.load()
            for told in ("icc_profile", "gamma"):
                opened.info.pop(told, None)
            samples_HWC = np.asarray(to_rgb(opened))
    except UnreadableImageError:
        raise
    except DECODE_ERRORS as error:
        raise unreadable(error) from error
    return min(hashlib.sha256(f"{view.shape}".encode() + view.tobytes()).digest() for view in _upright(samples_HWC))


def _upright(samples_HWC: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """Of the eight ways to turn and mirror a picture, that with the darkest corner first; several where they tie."""
    height, width = (-(-side // 2) for side in samples_HWC.shape[:2])
    rows, columns = (slice(height), slice(-height, None)), (slice(width), slice(-width, None))
    quarters = np.array([[samples_HWC[row, column].sum(dtype=np.int64) for column in columns] for row in rows])
    views = [
        (np.rot90(whole, turns), np.rot90(quarter, turns))
        for whole, quarter in ((samples_HWC, quarters), (samples_HWC[:, ::-1], quarters[:, ::-1]))
        for turns in range(4)
    ]
    places = [(whole.shape, quarter.ravel().tolist()) for whole, quarter in views]
    return [whole for (whole, _), place in zip(views, places, strict=True) if place == min(places)]
