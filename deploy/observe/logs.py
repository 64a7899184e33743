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
# A folder's name may have blanks: they belong to it where a slash follows.
_PATH = re.compile(r"(?<![\w:/.])~?(?:/[\w.@+\-]+(?: +[\w.@+\-]+)*(?=/))*(?:/[\w.@+\-]+)/?")
_SUFFIXES = (
    "png|jpe?g?|jfif|webp|bmp|gif|tiff?|ppm|pgm|avif|jp2|hei[cf]"
    "|zip|csv|np[yz]|onnx|pth?|toml|jsonl?|safetensors|key|pem|crt|txt"
)
_FILE = re.compile(rf"\b[\w.@+\-]+\.(?:{_SUFFIXES})\b", re.I)
_WHOLE_FILE = re.compile(rf".*\.(?:{_SUFFIXES})", re.I | re.S)


class JsonFormatter(logging.Formatter):
    """One JSON object per record: time (UTC), level, logger, message; exceptions by type only."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line, scrubbed."""
        entry = {
            "time": dt.datetime.fromtimestamp(record.created, dt.UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": scrub(_message(record)),
        }
        if record.exc_info and record.exc_info[0]:
            entry["exception"] = record.exc_info[0].__name__
        return json.dumps(entry)


def _message(record: logging.LogRecord) -> str:
    """The text of a record; what is the name of a file as a whole, blanks and folders with it, is taken out first."""
    if not isinstance(record.args, tuple):
        return record.getMessage()
    shown = tuple(_without_name(each) for each in record.args)
    return str(record.msg) % shown if shown else str(record.msg)


def _without_name(argument: object) -> object:
    text = str(argument) if isinstance(argument, str | Path) else ""
    if not _WHOLE_FILE.fullmatch(text):
        return argument
    return "<path>" if text.startswith(("/", "~")) else "<file>"


class PlainFormatter(logging.Formatter):
    """Time and message for people; what names of files may hold to break the line or move a cursor is an escape."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(message)s", datefmt="%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's name
        """The line of a record; a traceback follows unchanged."""
        record.message = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in record.message)
        return super().formatMessage(record)


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
        handler.setFormatter(PlainFormatter())
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
