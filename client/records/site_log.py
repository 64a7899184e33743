"""The site's own log files, for its operator only."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import RotatingFileHandler

from client.home import Home
from client.private_files import private_files


@contextmanager
def site_log(home: Home, name: str = "rounds", logger: str = "maskfed") -> Iterator[None]:
    """Write what `logger` says to `logs/<name>.log` for as long as the block runs; it is for the operator only."""
    with private_files():
        home.logs.mkdir(parents=True, exist_ok=True)
        handler = RotatingFileHandler(home.logs / f"{name}.log", maxBytes=2**22, backupCount=3)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    source = logging.getLogger(logger)
    source.addHandler(handler)
    source.setLevel(logging.INFO)
    try:
        yield
    finally:
        source.removeHandler(handler)
        handler.close()
