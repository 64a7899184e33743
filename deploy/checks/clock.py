"""Clocks: how far a site's and the coordinator's may differ, and what a host can tell about its own.

A SuperLink refuses a signed call whose time lies more than 5 s ahead of its own clock or more than 305 s behind, and a
SuperNode that is refused ends with code 0 and says nothing of clocks. So the difference is looked at before.
"""

import ctypes
import datetime as dt
import email.utils
import json
import logging
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx

from deploy.checks.dial import Way
from deploy.errors import ProvisionError
from deploy.identity.tls import client_context

logger = logging.getLogger(__name__)

LARGEST_AHEAD_SECONDS = 4.0
"""Of a site before the coordinator. The SuperLink allows 5 s; the door tells whole seconds."""
LARGEST_BEHIND_SECONDS = 120.0
"""Of a site after the coordinator. The SuperLink allows 305 s; a call may wait for a busy link."""
CURE = "set the clock that is wrong: timedatectl set-ntp true"
TAIL_BYTES = 256 * 1024
_TIME_ERROR = 5


def check_clock(way: Way, ca_certificate: Path, identity: Path) -> float | None:
    """Compare this clock with the coordinator's, as its door tells it; for each start of a site.

    Args:
        way: to the door, which tells its time to certified sites only.
        ca_certificate: the federation's CA.
        identity: the site's node key, its certificate beside it.

    Returns:
        Seconds by which this clock is ahead; None when the door does not answer, which is no reason not to start.

    Raises:
        ProvisionError: they differ by more than signed calls may.
    """
    try:
        ahead = seconds_ahead(way, ca_certificate, identity)
    except (httpx.HTTPError, OSError, KeyError, ValueError):
        return None
    if not -LARGEST_BEHIND_SECONDS <= ahead <= LARGEST_AHEAD_SECONDS:
        side = "ahead of" if ahead > 0 else "behind"
        raise ProvisionError(
            f"this clock is {abs(ahead):.0f} s {side} the coordinator's at {way.address}, at most "
            f"{LARGEST_AHEAD_SECONDS:.0f} s ahead or {LARGEST_BEHIND_SECONDS:.0f} s behind work: {CURE}"
        )
    return ahead


def seconds_ahead(way: Way, ca_certificate: Path, identity: Path) -> float:
    """Seconds by which this clock is ahead of the door's, within half a second and half of the way there.

    Raises:
        httpx.HTTPError: no answer.
        KeyError, ValueError: an answer without a time.
    """
    context = client_context(ca_certificate, identity)
    sent = dt.datetime.now(dt.UTC)
    reply = httpx.get(
        f"https://{way.address}/health", verify=context, proxy=way.proxy or None, timeout=5, trust_env=False
    )
    middle = sent + (dt.datetime.now(dt.UTC) - sent) / 2
    told = email.utils.parsedate_to_datetime(reply.headers["date"]) + dt.timedelta(seconds=0.5)
    return (middle - told).total_seconds()


def check_own_clock(files: Iterable[Path], now: dt.datetime | None = None) -> None:
    """Refuse to start with a clock that stands before what this host has written itself.

    Raises:
        ProvisionError: one of `files` is of the future.
    """
    now = now or dt.datetime.now(dt.UTC)
    for path in files:
        if not path.exists():
            continue
        written = dt.datetime.fromtimestamp(path.stat().st_mtime, dt.UTC)
        if (written - now).total_seconds() > LARGEST_BEHIND_SECONDS:
            raise ProvisionError(
                f"the clock says {now:%Y-%m-%d %H:%M} UTC, but {path} was written at {written:%Y-%m-%d %H:%M}: {CURE}"
            )


def warn_of_free_clock() -> None:
    """Log a warning when nothing sets the clock; called at each start."""
    if is_synchronised() is False:
        logger.warning("the clock of this host is not synchronised, as its kernel says: timedatectl set-ntp true")


def is_synchronised() -> bool | None:
    """Whether the kernel's clock is kept by NTP or the like; None where it cannot be asked."""
    if sys.platform != "linux":
        return None
    state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512))  # modes 0: only reads; larger than a timex
    return None if state < 0 else bool(state != _TIME_ERROR)


def refused_clocks(edge_log: Path) -> dict[str, float]:
    """Addresses whose newest refused call was signed at a wrong time, with the seconds by which they are ahead.

    Read from the end of the door's log, where each refused call stands with the time that it was signed at.
    """
    found: dict[str, float] = {}
    if not edge_log.exists():
        return found
    with edge_log.open("rb") as file:
        file.seek(max(0, edge_log.stat().st_size - TAIL_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    for line in lines:
        try:
            entry: dict[str, Any] = json.loads(line)
            signed, refused = (dt.datetime.fromisoformat(entry[name]) for name in ("signed", "time"))
            ahead = (signed - refused).total_seconds()
            address = str(entry["from"])
        except (ValueError, KeyError, TypeError):
            continue
        if entry.get("status") == httpx.codes.UNAUTHORIZED:
            found[address] = ahead
    return {
        address: ahead
        for address, ahead in found.items()
        if not -LARGEST_BEHIND_SECONDS <= ahead <= LARGEST_AHEAD_SECONDS
    }
