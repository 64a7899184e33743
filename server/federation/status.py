"""Watching runs: a live table until a run ends, and what `status` tells of all of them."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from server.federation.fleet.superlink_types import ControlError
from server.federation.offer_table import newest_offers, offer_table
from server.federation.resubmission import Wanted, WantedRun
from server.federation.round_facts import distance_text, epsilon_text, number_text, round_facts, sites_text
from server.runs.run_directory import RunDir
from shared.errors import InputError
from shared.storage.room import room_problem
from shared.storage.round_records import rounds_of
from shared.storage.runlog import RunLogReader, damage_text

if TYPE_CHECKING:
    from server.federation.fleet.superlink import Control

POLL_SECONDS = 1.0
AWAY_SECONDS = 600.0
"""How long a follower waits for a SuperLink that cannot be reached."""
HEARD_SECONDS = 2.0
"""How long a SuperLink may take to say that it is there; what is told comes from files."""
SHOWN_ROUNDS = 25
"""Newest rounds in the table; the JSON has all."""
COLUMNS = ("round", "sites", "loss", "update", "MB", "seconds", "epsilon", "distance")
NARROW, NARROWEST = ("round", "sites", "loss", "distance"), ("round", "loss", "distance")
WIDE, HALF = 80, 36
"""Characters from which on all columns, or those of `NARROW`, can be read."""
EXIT_CODES = {"completed": 0, "failed": 1, "stopped": 1}


def connect(home: Path, timeout_seconds: float | None = None) -> "Control":
    """The SuperLink of a home; Flower is loaded when it is asked, and not to tell what lies in files."""
    from server.federation.fleet import superlink

    return superlink.connect(home, *(() if timeout_seconds is None else (timeout_seconds,)))


def follow(home: Path, run: str, *, as_json: bool = False, console: Console | None = None) -> int:
    """Show a run until it has ended, submitting it again if it dies; exit code 0: completed, 1: failed or stopped."""
    console = console or Console(stderr=as_json)
    wanted, log = Wanted(home), RunLogReader(RunDir(home / "runs" / run).metrics)
    try:
        with Live(console=console, refresh_per_second=2) as live:
            seen = time.monotonic()
            while (entry := _entry(wanted, run)).status == "running":
                live.update(_shown(summarise(home, entry, log)))
                time.sleep(POLL_SECONDS)
                seen = time.monotonic() if _tick(home, wanted) else seen
                if time.monotonic() - seen > AWAY_SECONDS:
                    raise ControlError(
                        f"the SuperLink is away for {AWAY_SECONDS:g} s: run {run} continues with `maskfed-server start`"
                    )
            summary = summarise(home, entry, log)
            live.update(_shown(summary))
    except KeyboardInterrupt:
        console.print(
            f"run {run} continues in the background: `maskfed-server status {run}`, or `stop {run}`", markup=False
        )
        raise
    if as_json:
        Console().print_json(data=summary)
    elif summary["reason"]:
        console.print(f"run {run} {entry.status}: {summary['reason']}", markup=False)
    return EXIT_CODES[entry.status]


def _shown(summary: dict[str, Any]) -> Group:
    """What a follower sees: the offers until a round has begun, then the rounds."""
    offers = summary["offers"] if not summary["history"] else []
    return Group(*([offer_table(offers, summary["rounds"])] if offers else []), table(summary))


def summarise(home: Path, entry: WantedRun, log: RunLogReader | None = None) -> dict[str, Any]:
    """Everything that is known of a run, as JSON types; `log` reads on where it stopped the last time."""
    run = RunDir(home / "runs" / entry.run)
    log = log or RunLogReader(run.metrics)
    events = log.read()
    rounds = {event["round"]: event for event in rounds_of(events, run.checkpoints)}
    evaluations = {event["round"]: event for event in events if event["kind"] == "evaluation"}
    is_over = entry.status != "running"
    return {
        "run": entry.run,
        "status": entry.status,
        "reason": entry.reason or ("" if is_over else room_problem(run.path) or _slow_start(home, entry.run_id)),
        "rounds": run.experiment.federation.rounds,
        "rounds_done": max(rounds, default=0),
        "damage": damage_text(log.damaged) if log.damaged else "",
        "resubmissions": sum(event["kind"] == "resubmitted" for event in events),
        "flower_run_id": entry.run_id,
        "folder": str(run.path),
        "progress": {} if is_over else _progress(run),
        "start_metrics": evaluations[0]["metrics"] if 0 in evaluations else {},
        "offers": newest_offers(events),
        "history": [round_facts(rounds[index], evaluations.get(index)) for index in sorted(rounds)],
    }


def all_runs(home: Path, run: str = "") -> list[dict[str, Any]]:
    """Summaries of one run, or of all runs of a home.

    Raises:
        InputError: the named run is unknown.
    """
    wanted = Wanted(home)
    if wanted.has_running():
        _tick(home, wanted)
    entries = [_entry(wanted, run)] if run else list(wanted.runs().values())
    return [summarise(home, entry) for entry in entries]


def table(summary: dict[str, Any], width: int | None = None) -> Table:
    """One line per round: sites by outcome, loss, bytes, seconds, epsilon, distance; the current round last.

    In a terminal of `width` characters that is too narrow for all columns, those that tell least are left out.
    """
    width = shutil.get_terminal_size().columns if width is None else width
    columns = COLUMNS if width >= WIDE else NARROW if width >= HALF else NARROWEST
    title = f"run {summary['run']}: {summary['status']}, round {summary['rounds_done']} of {summary['rounds']}"
    if summary["damage"]:
        title += f", metrics.jsonl: {summary['damage']}"
    if summary["resubmissions"]:
        title += f", resubmitted {summary['resubmissions']} times"
    shown = Table(title=title, title_justify="left", box=box.HEAVY_HEAD if columns == COLUMNS else None)
    for column in columns:
        is_text = column in ("sites", "distance")
        shown.add_column(column, justify="left" if column == "sites" else "right", no_wrap=not is_text, overflow="fold")

    def add(*cells: str) -> None:
        shown.add_row(*(cell for cell, column in zip(cells, COLUMNS, strict=True) if column in columns))

    if summary["start_metrics"]:
        add("0", "start", *[""] * 5, distance_text(summary["start_metrics"]))
    for line in summary["history"][-SHOWN_ROUNDS:]:
        add(
            str(line["round"]),
            sites_text(line),
            number_text(line["loss"]),
            number_text(line["update_norm"])
            if line["weights_changed"]
            else "undone"
            if line["undone"]
            else "unchanged",
            f"{(line['bytes_sent'] + line['bytes_received']) / 1e6:.1f}",
            f"{line['seconds']:.1f}",
            epsilon_text(line),
            distance_text(line["metrics"]),
        )
    progress = summary["progress"]
    if progress:
        states = ", ".join(f"{site} {state}" for site, state in sorted(progress["sites"].items()))
        spent = f"{max(0.0, time.time() - progress['since']):.0f}"
        add(str(progress["round"]), f"{progress['stage']}: {states}" if states else progress["stage"],
                      "", "", "", spent, "", "")  # fmt: skip
    return shown


def print_log(home: Path, run: str, write: Callable[[str], object]) -> None:
    """Write the output of a run's newest ServerApp, and go on until it ends.

    Raises:
        InputError: the run is unknown.
    """
    entry = _entry(Wanted(home), run)
    with connect(home) as control:
        for part in control.logs(entry.run_id):
            write(part)


def _entry(wanted: Wanted, run: str) -> WantedRun:
    runs = wanted.runs()
    if run not in runs:
        raise InputError(f"run {run!r} is unknown: known are {', '.join(runs) or 'none'}")
    return runs[run]


def _slow_start(home: Path, run_id: int) -> str:
    """Why a run does not begin, when its superexec noted that its process did not start in time, or froze."""
    try:
        told = json.loads((home / "flwr" / "superexec" / "slow-start.json").read_text(encoding="ascii"))
        if told["run_id"] != run_id:
            return ""
        seconds, is_frozen = told["seconds"], told["is_frozen"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    slow = f"did not start within {seconds} s and was started again: the machine is too slow or busy"
    return f"its process {'was frozen and was started again' if is_frozen else slow}"


def _tick(home: Path, wanted: Wanted) -> bool:
    """Look after wanted runs; false when the SuperLink cannot be reached."""
    try:
        with connect(home, HEARD_SECONDS) as control:
            control.nodes()
        with connect(home) as control:
            wanted.tick(control)
    except ControlError:
        return False
    return True


def _progress(run: RunDir) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(run.progress.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value


def _change(line: dict[str, Any]) -> str:
    return number_text(line["update_norm"]) if line["weights_changed"] else "undone" if line["undone"] else "unchanged"
