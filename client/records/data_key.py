"""The site's secret key, under which it recognises its images and draws the streams of plain rounds."""

import hashlib
import os

from client.home import Home
from client.private_files import check_private, write_private
from shared.errors import InputError

DATA_KEY_BYTES = 32


def read_data_key(home: Home) -> bytes:
    """The site's 32 secret bytes; only a scan makes them, and only before the ledger knows a data set.

    Raises:
        InputError: missing, readable by others, or not 32 bytes.
    """
    if not home.data_key.exists():
        raise InputError(
            f"{home.data_key} is missing: put it back from the backup; if it is lost, `data scan --new-key`"
        )
    check_private(home.data_key)
    key = home.data_key.read_bytes()
    if len(key) != DATA_KEY_BYTES:
        raise InputError(f"{home.data_key} has {len(key)} bytes, not {DATA_KEY_BYTES}: put it back from the backup")
    return key


def create_data_key(home: Home) -> None:
    """Draw the site's secret."""
    write_private(home.data_key, os.urandom(DATA_KEY_BYTES))


def key_id(key: bytes) -> str:
    """Public name of a secret key, the site's or the machine's."""
    return hashlib.sha256(b"maskfed key " + key).hexdigest()[:16]
