"""Zip archives, opened after what could hide members of them was looked for. No torch."""

import os
import struct
import zipfile
from pathlib import Path

from shared.errors import InputError

_LOCAL_HEADER = b"PK\x03\x04"
_END_RECORD, _END_RECORD_BYTES, _IN_ZIP64 = b"PK\x05\x06", 22, 0xFFFF


def open_zip(path: Path) -> zipfile.ZipFile:
    """The archive, after what could hide members of it was looked for.

    Raises:
        InputError: not a zip, damaged, cut off, or one that readers understand differently.
    """
    remedy = "copy or download it again, or unpack it and give the folder"
    try:
        archive = zipfile.ZipFile(path)
        problem = _ambiguity(archive, path)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, UnicodeDecodeError) as error:
        with path.open("rb") as file:
            is_cut = file.read(4) == _LOCAL_HEADER
        if not is_cut and not zipfile.is_zipfile(path):
            raise InputError(f"images {path}: is not a zip file; give a folder of images or a zip of one") from error
        raise InputError(f"images {path}: is a damaged or incomplete zip ({error}); {remedy}") from error
    if problem:
        archive.close()
        raise InputError(f"images {path}: {problem}; {remedy}")
    return archive


def _ambiguity(archive: zipfile.ZipFile, path: Path) -> str:
    """Why readers may see other members than the directory lists: an empty text where none can."""
    members = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    with path.open("rb") as file:
        file.seek(-_END_RECORD_BYTES - len(archive.comment), os.SEEK_END)
        if problem := _doubt_of_end(file.read(_END_RECORD_BYTES), len(members)):
            return problem
        if members and members[0].header_offset < 0:
            return "its beginning is missing"
        place = 0
        for start, end in [(one.header_offset, one.header_offset + _least_bytes(one)) for one in members] + [
            (archive.start_dir, archive.start_dir)
        ]:
            file.seek(place)
            # A member that the directory does not list: of a second archive in front, or left by a repair.
            if start > place and _LOCAL_HEADER in file.read(start - place):
                return "it holds members that its directory does not list"
            place = max(place, end)
    return ""


def _doubt_of_end(record: bytes, num_members: int) -> str:
    """What is wrong with an archive's end record; an empty text where nothing is."""
    if not record.startswith(_END_RECORD):
        return "it has bytes behind its end"
    disk, first_disk, _, counted = struct.unpack("<4H", record[4:12])
    if {disk, first_disk} - {0, _IN_ZIP64}:
        return "it is one part of a split archive"
    if counted not in (num_members, _IN_ZIP64):
        return f"its end counts {counted} members, its directory has {num_members}"
    return ""


def _least_bytes(entry: zipfile.ZipInfo) -> int:
    """Bytes of a member's local header, as far as its name, and of its data."""
    return 30 + len(entry.orig_filename.encode("utf-8" if entry.flag_bits & 0x800 else "cp437")) + entry.compress_size
