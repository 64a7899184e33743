"""A reference that nobody pools: ask every site for its feature statistics, and keep their sum. No torch.

`ask_sites` runs in the evaluator's command: it writes a run directory with the question and submits it. `gather` runs
in the ServerApp of that run: it asks the sites that are online and writes each answer beside the question.
"""

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict

from server.federation.fleet.registry import check_home
from server.federation.messaging.question import collect, reasons, submit
from server.federation.messaging.transport import Grid, Timing
from server.runs.run_directory import create
from shared.errors import InputError
from shared.evaluation.feature_statistics import (
    FeatureSpace,
    check_same_space,
    load_statistics,
    parse_statistics,
    save_statistics,
)
from shared.experiment.config import Experiment
from shared.messages.statistics import MAX_FILE_BYTES, StatisticsQuery, parse_answer, parse_query
from shared.storage.files import write_atomically
from shared.storage.runlog import RunLog

QUESTION_FILE, PROJECTION_FILE, SITES_FOLDER, POOLED_FILE = (
    "question.json",
    "projection.safetensors",
    "sites",
    "pooled.safetensors",
)
DEADLINE_SECONDS = 3600.0


@dataclass(frozen=True)
class StatisticsQuestion:
    """What the evaluator wants to know."""

    query: StatisticsQuery
    projection: Path | None = None


def question_for(
    release: Literal["exact", "dp"], noise_multiplier: float, projection: Path | None, space: FeatureSpace
) -> StatisticsQuestion:
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
    return StatisticsQuestion(query, projection)


def ask_sites(
    home: Path | None,
    experiment: Experiment,
    question: StatisticsQuestion,
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
        ControlError: the SuperLink cannot be reached, or the question did not end in time.
    """
    if home is None:
        raise InputError("--reference federated asks the sites: give --home, the coordinator's folder")
    check_home(home)
    run = create(home / "runs" / question.query.run, experiment)
    write_atomically(run.path / QUESTION_FILE, question.query.model_dump_json(indent=2) + "\n")
    if question.projection is not None:
        write_atomically(run.path / PROJECTION_FILE, question.projection.read_bytes())
    outcomes = submit(
        home,
        experiment,
        question.query.run,
        "statistics",
        say,
        poll_seconds=poll_seconds,
        deadline_seconds=DEADLINE_SECONDS,
    )
    files = sorted((run.path / SITES_FOLDER).glob("*.safetensors"))
    if not files:
        raise InputError(f"no site released statistics: {reasons(outcomes)}")
    pooled = functools.reduce(operator.add, (load_statistics(file) for file in files))
    save_statistics(pooled, run.path / POOLED_FILE)
    return run.path / POOLED_FILE


def gather(
    grid: Grid, home: Path, folder: Path, timing: Timing | None = None, deadline_seconds: float = DEADLINE_SECONDS
) -> None:
    """Ask, and write what comes: `sites/<alias>.safetensors`, and one line per site in the run log."""
    query = parse_query((folder / QUESTION_FILE).read_text(encoding="utf-8"))
    file = folder / PROJECTION_FILE
    collect(
        grid,
        home,
        _record(query, file.read_bytes() if file.exists() else b""),
        MessageType.QUERY,
        lambda message, alias: _take(message, query, alias, folder / SITES_FOLDER),
        RunLog(folder / "metrics.jsonl"),
        "statistics",
        timing=timing,
        deadline_seconds=deadline_seconds,
    )


def _take(message: Message, query: StatisticsQuery, alias: str, folder: Path) -> tuple[str, str]:
    """Check an answer and keep its statistics; its outcome and reason."""
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
