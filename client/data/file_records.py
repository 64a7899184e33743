"""What is kept of the files of a scan: HMACs of bytes and pixels, under the site's key and the machine's. No torch."""

from dataclasses import dataclass, field

from client.data.held_out import Picture, recorder
from shared.data.image_set import ImageCache
from shared.data.images import ImageSource
from shared.data.pixels import UnreadableImageError, stored_size
from shared.errors import InputError


@dataclass
class Seen:
    """Records of the files of a scan; those of pictures in one order."""

    pictures: list[Picture] = field(default_factory=list)
    """Of files that decode, under the site's key."""
    machine_pairs: list[tuple[str, str]] = field(default_factory=list)
    """The same under the machine's key."""
    files: list[str] = field(default_factory=list)
    """Bytes of every file, also of those that do not decode, under the site's key."""
    machine_files: list[str] = field(default_factory=list)
    sides: list[int] = field(default_factory=list)
    """Shorter side of each picture as it is in its file, in pixels."""


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
    for number, name in enumerate(source.names):
        try:
            data = source.read(name)
            side = min(stored_size(data)) if name in row_of else 0
        except UnreadableImageError:
            continue
        except OSError as error:
            raise InputError(
                f"images {source.path}: {name}: {error.strerror or error}; cure it, then scan again"
            ) from error
        seen.files.append(own(data))
        seen.machine_files.append(machine(data))
        if name in row_of:
            pixels = images.images[row_of[name]].tobytes()
            person = None if persons is None else own(persons[number].encode(errors="surrogateescape"))
            seen.pictures.append(Picture(row_of[name], (seen.files[-1], own(pixels)), person))
            seen.machine_pairs.append((seen.machine_files[-1], machine(pixels)))
            seen.sides.append(side)
    return seen
