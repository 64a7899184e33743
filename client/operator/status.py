"""What the operator sees of a running site, and the lock that says it runs. No torch."""

import fcntl
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from client.data.dataset import current_id, open_dataset
from client.home import Home
from client.private_files import private_files
from client.records.chain import Entry, read_chain
from client.records.ledger import read_ledger
from client.records.ledger_history import History, head_problem
from client.records.spending import TOTAL_CHANGES, Total, read_kept_total
from client.settings import SiteConfig
from client.training.progress import Progress, read_progress
from shared.errors import InputError
from shared.storage.room import room_problem

NEWEST_EVENTS = 5
FIRST = ("task", "what", "run", "server_round")
"""Fields that an event's line begins with."""
CURES = {
    "experiment_not_approved": "read and approve it: `maskfed-client approve list`",
    "roster_not_approved": "compare the sites' keys: `maskfed-client approve list`",
    "code_not_approved": "`maskfed-client approve code`, after an upgrade",
    "data_not_ready": "see `maskfed-client doctor`",
    "ledger_damaged": "see `maskfed-client ledger verify`",
    "clock": "set the clock (NTP); if it is right now, `maskfed-client ledger accept-clock`",
    "disk_full": "make room",
    "failed": "see logs/rounds.log",
}
"""What the operator can do, by refusal code."""


@contextmanager
def hold_site(home: Home) -> Iterator[None]:
    """Be the only `start` (or `leave`) of a home.

    Raises:
        InputError: another one runs.
    """
    with private_files():
        home.path.mkdir(parents=True, exist_ok=True)
    descriptor = _lock(home)
    if descriptor is None:
        raise InputError(f"site {home.path} is running already: stop that `maskfed-client start` first")
    try:
        yield
    finally:
        os.close(descriptor)


def is_running(home: Home) -> bool:
    """Whether a `start` holds the home."""
    descriptor = _lock(home)
    if descriptor is not None:
        os.close(descriptor)
    return descriptor is None


class SiteView:
    """Hands out each new journal entry as one line, and how far a running round is."""

    def __init__(self, home: Home, write: Callable[[str], None]) -> None:
        self._home, self._write = home, write
        self._seen = len(read_chain(home.journal))
        self._journal_size = _size(home.journal)
        self._shown: Progress | None = None

    def show_new(self) -> None:
        """Tell what was appended since the last call; the journal is read only when it has grown."""
        if _size(self._home.journal) == self._journal_size:
            return
        self._journal_size = _size(self._home.journal)
        entries = read_chain(self._home.journal)
        for entry in entries[self._seen :]:
            self._write(event_line(entry))
        self._seen = len(entries)

    def show_lines(self) -> None:
        """For output that is no terminal: new entries, and a line for each tenth of a round."""
        now, before = read_progress(self._home), self._shown
        if now and (now[:2] != (before or now)[:2] or before is None or _tenth(now) > _tenth(before)):
            self._write(f"  training: run {now.run} round {now.server_round}, step {now.steps_done} of {now.steps}")
            self._shown = now
        self.show_new()


def _tenth(progress: Progress) -> int:
    return 10 * progress.steps_done // max(1, progress.steps)


def event_line(entry: Entry) -> str:
    """One journal entry for people; a refusal that the operator can do something about says what."""
    fields = dict(entry.fields)
    match entry.kind:
        case "refusal":
            code, reason = str(fields.pop("code")), str(fields.pop("reason"))
            cure = f"; {CURES[code]}" if code in CURES else ""
            text = f"REFUSED ({code}): {reason}{cure}"
        case "release" if "bytes" in fields:
            text = f"released {fields.pop('bytes') / 1e6:.1f} MB: {', '.join(fields.pop('numbers'))}; {_spent(fields)}"
        case kind:
            text = kind
    rest = ", ".join(f"{key} {_short(value)}" for key, value in sorted(fields.items(), key=_by_interest))
    joint = (": " if text == entry.kind else "; ") if rest else ""
    return f"{entry.time.astimezone():%Y-%m-%d %H:%M:%S} {text}{joint}{rest}"


def _spent(fields: dict[str, Any]) -> str:
    is_unbounded, epsilon = fields.pop("is_unbounded"), fields.pop("epsilon")
    part = "" if epsilon is None else f"epsilon {epsilon:.3f}"
    return f"spent: unbounded{f' (the DP part alone: {part})' if part else ''}" if is_unbounded else f"spent: {part}"


def _by_interest(field: tuple[str, object]) -> tuple[int, str]:
    name = field[0]
    return FIRST.index(name) if name in FIRST else len(FIRST), name


def status_facts(home: Home, settings: SiteConfig) -> dict[str, Any]:
    """Data, spending and newest entries of the journal; `spent` is a `Total`, or None before the first scan."""
    history, data_set, problem = read_ledger(home.ledger), None, ""
    try:
        data = open_dataset(home, settings.image_size)
        numbers = {"num_train": len(data.train), "num_held_out": len(data.held_out)}
        data_set = {"dataset_id": data.dataset_id, **numbers}
    except InputError as error:
        problem = str(error)
    dataset_id = current_id(home)
    spent = None if dataset_id is None else _total(home, history, dataset_id, settings.policy.delta)
    return {
        "disk_problem": room_problem(home.path),
        "data_set": data_set,
        "data_problem": problem,
        "ledger_problem": head_problem(history, Path(settings.head_file)) or "",
        "spent": spent,
        "epsilon_cap": settings.policy.epsilon_cap,
        "newest": read_chain(home.journal)[-NEWEST_EVENTS:],
    }


def _total(home: Home, history: History, dataset_id: str, delta: float) -> Total:
    """What was spent: as it was computed with the newest charge, or by the accountant, which takes seconds to load."""
    kept = read_kept_total(home.spent)
    newest = max((entry.sequence for entry in history.entries if entry.kind in TOTAL_CHANGES), default=-1)
    if kept and kept.sequence == newest and (kept.dataset_id, kept.delta) == (dataset_id, delta):
        epsilon = math.inf if kept.epsilon is None else kept.epsilon
        return history.total(dataset_id, delta, lambda _history, _delta: epsilon)
    from client.privacy.epsilon import epsilon_of

    return history.total(dataset_id, delta, epsilon_of)


def entry_facts(entry: Entry) -> dict[str, Any]:
    """One entry of the journal as JSON has it."""
    return {
        "sequence": entry.sequence,
        "time": entry.time.isoformat(timespec="milliseconds"),
        "kind": entry.kind,
        "fields": entry.fields,
    }


def summary(home: Home, settings: SiteConfig) -> Iterator[str]:
    """Data, spending and newest events in words, for `status`."""
    told = status_facts(home, settings)
    if told["disk_problem"]:
        yield f"DISK: {told['disk_problem']}"
    if data := told["data_set"]:
        images = f"{data['num_train']} images to train on, {data['num_held_out']} held out"
        yield f"data set {data['dataset_id']}: {images}"
    else:
        yield told["data_problem"]
    if told["ledger_problem"]:
        yield f"LEDGER: {told['ledger_problem']}"
    if total := told["spent"]:
        yield f"spent: {total}, cap {told['epsilon_cap']:g}; {total.num_charges} charges"
        if total.num_uncommitted:
            yield f"of these {total.num_uncommitted} were reserved and never completed; they count as spent"
    yield from map(event_line, told["newest"])


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text[:12] if len(text) == 64 and set(text) <= set("0123456789abcdef") else text


def _lock(home: Home) -> int | None:
    descriptor = os.open(home.path / "start.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor
