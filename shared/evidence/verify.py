"""Check an evidence bundle of maskfed: `python verify.py FILE --key KEY`. Needs Python 3.11 and `cryptography` alone.

A bundle is a ZIP file without compression. Beside its files it holds `manifest.json`, which names each of them with
size and SHA-256, and `signature.json`: the signer's Ed25519 public key and a signature over the manifest. Every byte
of the bundle is accounted for, so that no two programs see different contents. Who signed is known by the key alone:
get it from the coordinator or site itself, by phone for example.
"""

import argparse
import hashlib
import json
import re
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

DOMAIN = b"maskfed evidence 1\0"
"""What a signature begins with: no other statement of ours does."""
MANIFEST, SIGNATURE = "manifest.json", "signature.json"
MOST_FILES, MOST_BYTES = 1000, 256 * 2**20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_KEY = re.compile(r"[0-9a-f]{64}")
_LOCAL_HEADER, _CENTRAL_HEADER, _END = 30, 46, 22
"""Bytes of the records of a ZIP file beside names (APPNOTE 6.3.10, sections 4.3.7, 4.3.12 and 4.3.16)."""


class EvidenceError(ValueError):
    """The bundle is not what its signer made, or is signed by somebody else."""


def verify(file: Path, key: str) -> dict[str, Any]:
    """The manifest of a bundle that `key` has signed.

    Args:
        file: the bundle.
        key: Ed25519 public key of the signer, 64 hexadecimal digits; spaces and case do not matter.

    Raises:
        EvidenceError: damaged, changed, incomplete, too large, or signed with another key.
        OSError: the file cannot be read.
    """
    wanted = "".join(key.split()).lower()
    if not _KEY.fullmatch(wanted):
        raise EvidenceError(f"key {key[:80]!r} is not 64 hexadecimal digits: ask the signer for it")
    contents = read_contents(file)
    signed = contents.pop(MANIFEST, b"")
    manifest, signature = _json(signed, MANIFEST), _json(contents.pop(SIGNATURE, b""), SIGNATURE)
    if signature.get("key") != wanted:
        raise EvidenceError(f"signed with the key {str(signature.get('key'))[:64]}, not with {wanted}")
    _check_signature(wanted, str(signature.get("signature")), signed)
    _check_files(manifest, contents)
    return manifest


def read_contents(file: Path) -> dict[str, bytes]:
    """All files of a bundle by name, if they and their records are every byte of it.

    Raises:
        EvidenceError: no such ZIP file.
    """
    size = file.stat().st_size
    if size > MOST_BYTES:
        raise EvidenceError(f"{file}: {size} bytes, a bundle has at most {MOST_BYTES}")
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            _check_records(file, size, entries)
            return {entry.filename: _read(file, archive, entry) for entry in entries}
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, EOFError) as error:
        if isinstance(error, EvidenceError):
            raise
        raise EvidenceError(f"{file} is not a bundle, or damaged: {error}") from error


def _check_records(file: Path, size: int, entries: list[zipfile.ZipInfo]) -> None:
    names = [entry.filename for entry in entries]
    if len(names) > MOST_FILES or len(set(names)) < len(names) or not all(_NAME.fullmatch(name) for name in names):
        raise EvidenceError(f"{file}: too many files, two of one name, or a name that no bundle has")
    place = 0
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.extra or entry.comment or entry.header_offset != place:
            raise EvidenceError(f"{file}: {entry.filename} is not stored as bundles store files")
        place += _LOCAL_HEADER + len(entry.filename) + entry.file_size
    if size != place + sum(_CENTRAL_HEADER + len(name) for name in names) + _END:
        raise EvidenceError(f"{file}: holds bytes that belong to no file")


def _read(file: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    """A file, whose record before it says what its record at the end says: some programs read the first."""
    data = archive.read(entry)
    with file.open("rb") as opened:
        opened.seek(entry.header_offset)
        _, _, *told = struct.unpack("<IHHHIIIIHH", opened.read(_LOCAL_HEADER))
    flags, method, _when, crc, packed, size, name_bytes, more = told
    if (flags, method, crc, packed, size, name_bytes, more) != (
        *(0, zipfile.ZIP_STORED, entry.CRC),
        *(entry.file_size, entry.file_size, len(entry.filename), 0),
    ):
        raise EvidenceError(f"{file}: {entry.filename} is described in two ways")
    return data


def _json(data: bytes, name: str) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise EvidenceError(f"{name} is missing or damaged") from error
    if not isinstance(found, dict):
        raise EvidenceError(f"{name} is damaged")
    return found


def _check_signature(key: str, signature: str, manifest: bytes) -> None:
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)).verify(bytes.fromhex(signature), DOMAIN + manifest)
    except (InvalidSignature, ValueError) as error:
        raise EvidenceError("the signature is not of this manifest: it was changed") from error


def _check_files(manifest: dict[str, Any], contents: dict[str, bytes]) -> None:
    told = manifest.get("files")
    found = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in contents.items()}
    if told != found:
        named = told if isinstance(told, dict) else {}
        wrong = sorted(name for name in named.keys() | found.keys() if named.get(name) != found.get(name))
        raise EvidenceError(f"files that are missing, added or changed: {', '.join(map(str, wrong[:5])) or 'all'}")


def summary(manifest: dict[str, Any]) -> list[str]:
    """A line per fact and file."""
    facts = [f"{name}: {value}" for name, value in manifest.items() if name != "files"]
    return [*facts, *(f"  {name}  {told['bytes']} bytes" for name, told in manifest["files"].items())]


def main() -> int:
    """The command: 0 for a bundle that the key has signed, 1 for any other."""
    parser = argparse.ArgumentParser(description="Check an evidence bundle of maskfed.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--key", required=True, help="public key of the signer, 64 hexadecimal digits")
    options = parser.parse_args()
    try:
        manifest = verify(options.file, options.key)
    except (EvidenceError, OSError) as error:
        sys.stderr.write(f"error: {' '.join(ascii(str(error))[1:-1].split())}\n")
        return 1
    sys.stdout.write("".join(f"{ascii(line)[1:-1]}\n" for line in [*summary(manifest), "VERIFIED"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
