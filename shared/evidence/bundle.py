"""Writing an evidence bundle: files, a manifest of them, and a signature. `verify.py` has the form."""

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from shared.evidence.verify import DOMAIN, MANIFEST, SIGNATURE
from shared.messages.signature import public_text
from shared.storage.code_digest import installed_digest
from shared.storage.files import write_atomically
from shared.storage.versions import git_commit, installed_versions

_TIME = (1980, 1, 1, 0, 0, 0)


def write_bundle(path: Path, key: Ed25519PrivateKey, facts: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
    """Write a bundle, whole or not at all.

    Args:
        path: the file.
        key: the signer's.
        facts: what the manifest says beside time, versions, code digest and files.
        files: contents by name (letters, digits, dots, hyphens and underscores).
    """
    told = {
        "schema": 1,
        **facts,
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "versions": installed_versions() | {"commit": git_commit() or "unknown"},
        "code_digest": installed_digest(),
        "files": {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()
        },
    }
    manifest = json.dumps(told, indent=1).encode()
    signature = {"key": public_text(key), "signature": key.sign(DOMAIN + manifest).hex()}
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        for name, data in [
            *files.items(),
            (MANIFEST, manifest),
            (SIGNATURE, json.dumps(signature, indent=1).encode()),
        ]:
            archive.writestr(zipfile.ZipInfo(name, _TIME), data)
    write_atomically(path, written.getvalue())
