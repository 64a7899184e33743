"""Logs of the long-running commands: for people by default, one JSON object per line with MASKFED_LOG_FORMAT=json.

JSON logs are made to be collected elsewhere, so paths and names of files are taken out of every message; the site's own
files keep what an operator needs to find the cause.
"""

import datetime as dt
import errno
import json
import logging
import os
import re
import shutil
import sys
from pathlib import Path

FORMAT_VARIABLE = "MASKFED_LOG_FORMAT"
LEAST_FREE_BYTES = 2**20
LARGEST_LOG_BYTES = 64 * 2**20
_PATH = re.compile(r"(?<![\w:/.])~?(?:/[\w.@+\-]+)+/?")
_FILE = re.compile(
    r"\b[\w.@+\-]+\.(?:png|jpe?g|webp|bmp|gif|tiff?|ppm|zip|npy|toml|jsonl?|safetensors|key|pem|crt|txt)\b", re.I
)


class JsonFormatter(logging.Formatter):
    """One JSON object per record: time (UTC), level, logger, message; exceptions by type only."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line, scrubbed."""
        entry = {
            "time": dt.datetime.fromtimestamp(record.created, dt.UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": scrub(record.getMessage()),
        }
        if record.exc_info and record.exc_info[0]:
            entry["exception"] = record.exc_info[0].__name__
        return json.dumps(entry)


def scrub(text: str) -> str:
    """Replace paths by `<path>` and names of files by `<file>`."""
    return _FILE.sub("<file>", _PATH.sub("<path>", text))


def set_up_logging(quiet: tuple[str, ...] = ()) -> None:
    """Log to standard error in the format that the environment asks for; `quiet` loggers from warnings on.

    Warnings of libraries are for whoever changes this code: they are shown where Python's `-W` asks for them.
    """
    handler = logging.StreamHandler()
    if os.environ.get(FORMAT_VARIABLE) == "json":
        handler.setFormatter(JsonFormatter())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    if not sys.warnoptions:
        logging.captureWarnings(True)
        logging.getLogger("py.warnings").setLevel(logging.ERROR)
    for name in quiet:
        logging.getLogger(name).setLevel(logging.WARNING)


def tell(text: str) -> None:
    """A line of a long-running command for its operator: on standard output, or as a log record where logs are JSON."""
    if os.environ.get(FORMAT_VARIABLE) == "json":
        logging.getLogger("maskfed").info("%s", text)
    else:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()


def cap_logs(folder: Path, largest_bytes: int = LARGEST_LOG_BYTES) -> None:
    """Empty every `*.log` of a folder that has grown too large, so that no disk fills up; needs no free space.

    Where there is room its lines are kept as `<name>.1`; a full disk gets the room of both.
    Their writers append, so they go on at the start of the file; lines of that very moment can be lost.
    """
    for log in folder.glob("*.log"):
        if log.stat().st_size <= largest_bytes:
            continue
        kept = log.with_name(f"{log.name}.1")
        kept.unlink(missing_ok=True)
        try:
            shutil.copyfile(log, kept)
        except OSError:
            kept.unlink(missing_ok=True)
        os.truncate(log, 0)


def check_room(folder: Path) -> None:
    """Notice a full disk before somebody who writes does.

    Raises:
        OSError: next to nothing is free where `folder` lies.
    """
    if shutil.disk_usage(folder).free < LEAST_FREE_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
