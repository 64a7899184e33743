"""Pictures as they come: the image files of a folder or a zip, and what else lies there. No torch.

What is no image by its suffix is counted, what cannot be told apart is refused: nothing vanishes without a word.
"""

import errno
import hashlib
import lzma
import os
import threading
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from PIL import features

from shared.data.archives import open_zip
from shared.data.persons import persons_by_folder
from shared.data.pixels import HAS_HEIF, UnreadableImageError
from shared.errors import InputError

_HEIF = frozenset({".heic", ".heif"})
SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
    | ({".avif"} if features.check("avif") else set())
    | ({".jp2"} if features.check("jpg_2000") else set())
    | (_HEIF if HAS_HEIF else set())
)
# Each kind of compression has an error class of its own.
_DAMAGE = (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, EOFError, zlib.error, lzma.LZMAError)
_SHOWN_KINDS = 6
_BROKEN_LINK, _SPECIAL_FILE, _SEEN_FOLDER = "broken links", "special files", "folders met before"
# Previews and deleted files that file servers and systems keep beside the pictures; no viewer shows them.
_SYSTEM_FOLDERS = frozenset({"@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found"})
_SYSTEM = "folders of the system"
_NO_SUFFIX = "without suffix"
MOST_FILE_BYTES = 2**30
"""Of one picture: the most pixels that are decoded, with 16 bits for each of three colours, need as much."""


@dataclass(frozen=True)
class ImageSource:
    """The image files of a folder or zip, in a fixed order.

    Attributes:
        path: the folder or zip.
        names: file names relative to it with forward slashes, sorted.
        persons: name of the person of each file, its first folder below the common top, or None where a file has none.
        fingerprint: changes when a file is added, removed or rewritten.
        read: bytes of the file with a given name; safe to call from several threads. `UnreadableImageError` for a
            damaged member of a zip, `OSError` where the machine could not read.
        ignored: number of files that are no images, by suffix; hidden files are not among them.
    """

    path: Path
    names: tuple[str, ...]
    persons: tuple[str, ...] | None
    fingerprint: str
    read: Callable[[str], bytes]
    ignored: Mapping[str, int] = field(default_factory=dict)

    @property
    def owners(self) -> tuple[str, ...]:
        """The person of each file; without class folders every file counts as a person of its own."""
        return self.persons or self.names


def list_images(path: Path) -> ImageSource:
    """Find the images below a folder or inside a zip; nothing is decoded.

    Raises:
        InputError: no such path, not a folder or zip, an archive that is damaged, incomplete, encrypted or ambiguous, a
            folder that cannot be read, or no image in it.
    """
    try:
        source = _list_folder(path) if path.is_dir() else _list_zip(path) if path.is_file() else None
    except OSError as error:
        raise InputError(f"images {path}: {error.strerror or error}: {error.filename or path}; cure it") from error
    if source is None:
        what = "is neither folder nor file" if path.exists() else "does not exist"
        raise InputError(f"images {path}: {what}; give a folder of images or a zip of one")
    if not source.names:
        others = f" ({ignored_text(source.ignored)})" if source.ignored else ""
        known = " ".join(sorted(SUFFIXES))
        raise InputError(f"images {path}: no image file in it{others}; known suffixes are {known}")
    return source


def ignored_text(ignored: Mapping[str, int]) -> str:
    """What was left out, the most frequent kind first, as `5 .heic, 2 .txt ignored`; empty where nothing was."""
    kinds = sorted(ignored.items(), key=lambda item: (-item[1], item[0]))
    text = ", ".join(f"{count:,} {kind}" for kind, count in kinds[:_SHOWN_KINDS])
    if more := sum(count for _, count in kinds[_SHOWN_KINDS:]):
        text += f", {more:,} others"
    heif = "" if HAS_HEIF or not _HEIF & ignored.keys() else " (to read .heic: pip install 'maskfed[heic]')"
    return f"{text} ignored{heif}" if text else ""


def _list_folder(path: Path) -> ImageSource:
    ignored: Counter[str] = Counter()
    # Links come last: where a folder is reached in two ways, its own place names it.
    places: list[tuple[Path, str]] = [(path, "")]
    seen: set[tuple[int, int]] = set()
    found = sorted(each for folder, prefix in places for each in _walk(folder, prefix, seen, ignored, places))
    names = tuple(name for name, _, _ in found)
    digest = hashlib.sha256(repr(found).encode(errors="surrogateescape")).hexdigest()

    def read(name: str) -> bytes:
        with (path / name).open("rb") as file:
            _check_bytes(os.fstat(file.fileno()).st_size)
            return file.read()

    return ImageSource(path, names, persons_by_folder(names), digest, read, ignored)


def _check_bytes(size: int) -> None:
    """Refuse what no picture needs before it takes the memory.

    Raises:
        UnreadableImageError: more than `MOST_FILE_BYTES`.
    """
    if size > MOST_FILE_BYTES:
        raise UnreadableImageError(f"{size:,} bytes, at most {MOST_FILE_BYTES:,} are read: save it compressed")


def _walk(
    folder: Path, prefix: str, seen: set[tuple[int, int]], ignored: "Counter[str]", places: list[tuple[Path, str]]
) -> Iterator[tuple[str, int, int]]:
    status = folder.stat()
    # Class folders are often links; a link that leads back up would never end.
    if (status.st_dev, status.st_ino) in seen:
        ignored[_SEEN_FOLDER] += 1
        return
    seen.add((status.st_dev, status.st_ino))
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda each: each.name):
            if entry.name.startswith("."):
                continue
            match _kind(entry):
                case "folder" if entry.name.casefold() in _SYSTEM_FOLDERS:
                    ignored[_SYSTEM] += 1
                case "folder" if entry.is_symlink():
                    places.append((Path(entry.path), f"{prefix}{entry.name}/"))
                case "folder":
                    yield from _walk(Path(entry.path), f"{prefix}{entry.name}/", seen, ignored, places)
                case "file" if _suffix(entry.name) in SUFFIXES:
                    yield f"{prefix}{entry.name}", entry.stat().st_size, entry.stat().st_mtime_ns
                case "file":
                    ignored[_suffix(entry.name)] += 1
                case other:
                    ignored[other] += 1


def _kind(entry: "os.DirEntry[str]") -> str:
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
        return _BROKEN_LINK if entry.is_symlink() else _SPECIAL_FILE
    except OSError as error:
        # A link to itself; anything else is the machine's fault and stops the listing.
        if error.errno != errno.ELOOP:
            raise
        return _BROKEN_LINK


def _list_zip(path: Path) -> ImageSource:
    archive = open_zip(path)
    members = [entry for entry in archive.infolist() if not entry.filename.endswith("/")]
    by_name = {_member_name(entry): entry for entry in members}
    if len(by_name) < len(members):
        (twice, _), *_ = Counter(map(_member_name, members)).most_common(1)
        raise InputError(f"images {path}: two members are called {twice!r}; unpack it and give the folder")
    if any(entry.flag_bits & 1 for entry in members):
        raise InputError(f"images {path}: is encrypted; unpack it with its password and give the folder")
    visible = {name: entry for name, entry in by_name.items() if not _is_hidden(name)}
    hidden = {name for name in visible if _system_folder(name)}
    visible = {name: entry for name, entry in visible.items() if name not in hidden}
    found = sorted((name, one.file_size, one.CRC) for name, one in visible.items() if _suffix(name) in SUFFIXES)
    names = tuple(name for name, _, _ in found)
    ignored = Counter(suffix for suffix in map(_suffix, visible) if suffix not in SUFFIXES)
    ignored += Counter({_SYSTEM: len({_system_folder(name) for name in hidden})})
    digest = hashlib.sha256(repr(found).encode(errors="surrogateescape")).hexdigest()
    lock = threading.Lock()

    def read(name: str) -> bytes:
        _check_bytes(by_name[name].file_size)
        try:
            with lock:
                return archive.read(by_name[name])
        except _DAMAGE as error:
            raise UnreadableImageError(f"damaged in the archive: {error}") from error
        except OSError as error:
            # The machine gives its number; bzip2 raises one without where the bytes are wrong.
            if error.errno is not None:
                raise
            raise UnreadableImageError(f"damaged in the archive: {error}") from error

    return ImageSource(path, names, persons_by_folder(names), digest, read, ignored)


def _member_name(entry: zipfile.ZipInfo) -> str:
    """With forward slashes, which some programs for Windows do not write, and without `./`."""
    return str(PurePosixPath(entry.filename.replace("\\", "/")))


def _is_hidden(name: str) -> bool:
    """By the rule of folders; `..` is no name, it stands in zips of a folder beside the one where they were made."""
    return any((part.startswith(".") and part != "..") or part == "__MACOSX" for part in PurePosixPath(name).parts)


def _system_folder(name: str) -> str:
    """Path of the folder of the system that a member lies in; empty where there is none."""
    parents = PurePosixPath(name).parents
    return next((str(folder) for folder in parents if folder.name.casefold() in _SYSTEM_FOLDERS), "")


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower() or _NO_SUFFIX
