"""An old question is not answered again, however well it is signed.

A signature proves who asked, not when. Whoever holds the messages between coordinator and site could deliver an old one
once more, and the site would compute and be charged again. So every question says when it was asked and until when it
stands; a site refuses one whose time is over, and one that is older than the newest of its kind and run. The same
request for training, or for what removes masks, is let through again: it gets the stored answer. Nothing else is
stored, so nothing else is let through.
"""

import json
import time
from pathlib import Path

from client.private_files import write_private
from shared.messages.signature import SignatureError, Statement

STORED = ("train", "unmask")
"""Purposes whose answers are stored, and sent again as they were."""
Times = dict[str, tuple[int, int]]
"""By kind and run: when the newest question was asked, and until when it or an earlier one stands, Unix time in ms."""
MOST_STANDING = 10_000
"""Kinds and runs that are remembered at a time: 600 kB, written for each question."""


class ReplayError(SignatureError):
    """A question is genuine, but an old one."""


def check_fresh(file: Path, asked: Statement) -> None:
    """Refuse an old question; remember a new one, as long as it stands. To be called within `one_at_a_time` of `file`.

    Args:
        file: where the newest questions are remembered.
        asked: what is signed.

    Raises:
        ReplayError: its time is over, a newer one was taken, or the file cannot be read.
        OSError: the file cannot be written.
    """
    now_ms, key = round(1000 * time.time()), f"{asked.purpose} {asked.run}"
    if asked.expires_ms < now_ms:
        seconds = (now_ms - asked.expires_ms) // 1000
        raise ReplayError(f"the request's time was over {seconds} s ago: it is an old one, or a clock is wrong")
    known = _read(file)
    newest, until = known.get(key, (-1, 0))
    is_repeated = asked.issued_ms == newest
    if asked.issued_ms < newest or (is_repeated and asked.purpose not in STORED):
        what = "the same" if is_repeated else "a newer"
        raise ReplayError(f"{what} {asked.purpose} request of run {asked.run} was taken already")
    if not is_repeated:
        standing = {name: times for name, times in known.items() if times[1] >= now_ms and name != key}
        if len(standing) >= MOST_STANDING:
            raise ReplayError(f"{MOST_STANDING} questions stand already: this one may come again when some are over")
        # As long as any of them stands: an earlier one with more time must not outlive what is known of the later.
        newest_times = asked.issued_ms, max(until, asked.expires_ms)
        write_private(file, json.dumps(standing | {key: newest_times}).encode())


def _read(file: Path) -> Times:
    try:
        found = json.loads(file.read_bytes())
        return {str(name): (int(issued), int(expires)) for name, (issued, expires) in found.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, AttributeError) as error:
        raise ReplayError(f"{file} is damaged: remove it; until then no question is answered") from error
