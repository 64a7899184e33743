"""A reference that nobody pools: ask every site for its feature statistics, and keep their sum. No torch.

`ask_sites` runs in the evaluator's command: it writes a run directory with the question and submits it. `gather` runs
in the ServerApp of that run: it asks the sites that are online and writes each answer beside the question.
"""

import functools
import operator
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict

from server.registry import Registry
from server.rundir import create
from server.transport import Grid, Timing
from shared.config import Experiment
from shared.errors import InputError
from shared.files import write_atomically
from shared.runlog import RunLog, read_metrics
from shared.statistics import FeatureSpace, check_same_space, load_statistics, parse_statistics, save_statistics
from shared.statistics_query import MAX_FILE_BYTES, StatisticsQuery, parse_answer, parse_query

if TYPE_CHECKING:
    from server.control import Control

QUESTION_FILE, PROJECTION_FILE, SITES_FOLDER, POOLED_FILE = (
    "question.json",
    "projection.safetensors",
    "sites",
    "pooled.safetensors",
)
DEADLINE_SECONDS = 3600.0


@dataclass(frozen=True)
class Question:
    """What the evaluator wants to know."""

    query: StatisticsQuery
    projection: Path | None = None


def question_for(
    release: Literal["exact", "dp"], noise_multiplier: float, projection: Path | None, space: FeatureSpace
) -> Question:
    """The question for statistics in `space`, under a new name.

    Raises:
        InputError: a private release without projection, or a projection without one.
    """
    if (release == "dp") != (projection is not None):
        raise InputError("--private and --projection go together: `maskfed-server projection` makes one")
    query = StatisticsQuery(
        run=f"statistics-{datetime.now(UTC):%Y%m%d-%H%M%S}",
        kind=release,
        extractor=space.extractor,
        layer=space.layer,
        extractor_sha256=space.sha256,
        noise_multiplier=noise_multiplier if release == "dp" else 0.0,
    )
    return Question(query, projection)


def ask_sites(
    home: Path | None,
    experiment: Experiment,
    question: Question,
    say: Callable[[str], None] = lambda _: None,
    poll_seconds: float = 1.0,
) -> Path:
    """Ask all sites that are online and pool their statistics.

    Args:
        home: the coordinator's folder, with a running SuperLink.
        experiment: the audited model's; stored with the run.
        question: what is asked.
        say: told who answered and who refused, and why.
        poll_seconds: between two looks at the run.

    Returns:
        The pooled statistics file, kept for later evaluations.

    Raises:
        InputError: nobody released statistics, and why; or no home was given.
        ControlError: the SuperLink cannot be reached.
    """
    if home is None:
        raise InputError("--reference federated asks the sites: give --home, the coordinator's folder")
    from server.control import connect

    run = create(home / "runs" / question.query.run, experiment)
    write_atomically(run.path / QUESTION_FILE, question.query.model_dump_json(indent=2) + "\n")
    if question.projection is not None:
        write_atomically(run.path / PROJECTION_FILE, question.projection.read_bytes())
    with connect(home) as control:
        _wait(control, control.submit(experiment, question.query.run), poll_seconds)
    outcomes = [event for event in read_metrics(run.metrics) if event["kind"] == "statistics"]
    for event in outcomes:
        say(f"{event['site']}: {event['status']}{': ' + event['reason'] if event['reason'] else ''}")
    files = sorted((run.path / SITES_FOLDER).glob("*.safetensors"))
    if not files:
        reasons = "; ".join(f"{event['site']} {event['reason']}" for event in outcomes) or "no site was online"
        raise InputError(f"no site released statistics: {reasons}")
    pooled = functools.reduce(operator.add, (load_statistics(file) for file in files))
    save_statistics(pooled, run.path / POOLED_FILE)
    return run.path / POOLED_FILE


def gather(
    grid: Grid, home: Path, folder: Path, timing: Timing | None = None, deadline_seconds: float = DEADLINE_SECONDS
) -> None:
    """Ask, and write what comes: `sites/<alias>.safetensors`, and one line per site in the run log."""
    timing = timing or Timing()
    query = parse_query((folder / QUESTION_FILE).read_text(encoding="utf-8"))
    metrics = RunLog(folder / "metrics.jsonl")
    online = {node.node_id for node in grid.get_nodes()}
    sites = [site for site in Registry(home / "sites.json").active() if site.node_id in online]
    file = folder / PROJECTION_FILE
    record = _record(query, file.read_bytes() if file.exists() else b"")
    messages = [
        Message(record, site.node_id, MessageType.QUERY, ttl=deadline_seconds)
        for site in sites
        if site.node_id is not None
    ]
    waiting = {message_id: site.alias for message_id, site in zip(grid.push_messages(messages), sites, strict=True)}
    end = time.monotonic() + deadline_seconds
    while waiting and time.monotonic() < end:
        for message in grid.pull_messages(list(waiting)):
            alias = waiting.pop(str(message.metadata.reply_to_message_id), None)
            if alias is not None:
                status, reason = _take(message, query, alias, folder / SITES_FOLDER)
                metrics.write("statistics", site=alias, status=status, reason=reason)
        time.sleep(timing.poll_seconds if waiting else 0)
    for alias in waiting.values():
        metrics.write("statistics", site=alias, status="late", reason=f"no answer within {deadline_seconds:g} s")
    metrics.write("end", status="completed")


def _take(message: Message, query: StatisticsQuery, alias: str, folder: Path) -> tuple[str, str]:
    """Check an answer and keep its statistics; its outcome and reason."""
    if message.has_error():
        return "failed", str(message.error.reason)[:500]
    try:
        answer = parse_answer(str(message.content.config_records["header"]["json"]))
        if answer.status == "refused":
            return "refused", answer.reason
        array = message.content.array_records["arrays"]["file"]
        if len(array.data) > MAX_FILE_BYTES:
            return "rejected", f"statistics of {len(array.data)} bytes, at most {MAX_FILE_BYTES}"
        statistics = parse_statistics(np.asarray(array.numpy(), np.uint8).tobytes(), alias)
        if statistics.site != alias or statistics.release != query.kind:
            return "rejected", f"the statistics say site {statistics.site!r}, release {statistics.release!r}"
        if query.kind == "exact":
            check_same_space(query.space, statistics.space)
    except (InputError, KeyError, ValueError) as error:
        return "rejected", str(error)[:500]
    save_statistics(statistics, folder / f"{alias}.safetensors")
    return "released", ""


def _record(query: StatisticsQuery, file: bytes) -> RecordDict:
    arrays = {"file": Array(np.frombuffer(file, np.uint8))} if file else {}
    return RecordDict({"arrays": ArrayRecord(arrays), "header": ConfigRecord({"json": query.model_dump_json()})})


def _wait(control: "Control", run_id: int, poll_seconds: float) -> None:
    while not control.run_state(run_id).is_finished:
        time.sleep(poll_seconds)
