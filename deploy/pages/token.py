"""The secret of a live page: a file of the home that its owner alone can read, drawn anew by every `start`."""

import secrets
from pathlib import Path

from deploy.errors import ProvisionError
from deploy.identity.keys import check_private, replace_file

TOKEN_FILE = "page.token"
TOKEN_BYTES = 32


def draw_token(home: Path) -> str:
    """Write a new token, mode 0600, in place of the last one; the token."""
    token = secrets.token_urlsafe(TOKEN_BYTES)
    replace_file(home / TOKEN_FILE, f"{token}\n".encode(), 0o600)
    return token


def read_token(home: Path) -> str:
    """The token that this home's page asks for.

    Raises:
        ProvisionError: there is none, or others can read it.
    """
    path = home / TOKEN_FILE
    check_private(path)
    token = path.read_text(encoding="ascii").strip()
    if len(token) < TOKEN_BYTES:
        raise ProvisionError(f"{path} holds no token: start `start --page-port` again")
    return token


def address(port: int, token: str) -> str:
    """What to open in a browser: the token stands behind the #, which no browser sends to anybody."""
    return f"http://127.0.0.1:{port}/#token={token}"
