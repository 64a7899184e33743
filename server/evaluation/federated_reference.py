"""A reference that nobody pools: ask every site for its feature statistics, and keep their sum. No torch.

`ask_sites` runs in the evaluator's command: it writes a run directory with the question and submits it. `gather` runs
in the ServerApp of that run: it asks the sites that are online and writes each answer beside the question. Where the
experiment says `federation.secure` the answers are masked, and their sum is all that is ever there.
"""

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MessageType, RecordDict
from pydantic import Field

from server.federation.fleet.registry import check_home
from server.federation.messaging.question import collect, reasons, submit
from server.federation.messaging.transport import Grid, Timing
from server.runs.run_directory import create
from shared.errors import InputError
from shared.evaluation.feature_statistics import (
    FeatureSpace,
    Statistics,
    load_statistics,
    parse_statistics,
    save_statistics,
)
from shared.evaluation.private_statistics import Projection, load_projection, noise_facts
from shared.experiment.config import Experiment, Section
from shared.messages.envelope import header_record, read_bytes, read_header, validated
from shared.messages.statistics import MAX_FILE_BYTES, ReleasedFacts, StatisticsAnswer, StatisticsQuery
from shared.messages.text import clean
from shared.storage.files import write_atomically
from shared.storage.runlog import RunLog, read_metrics

QUESTION_FILE, PROJECTION_FILE = "question.json", "projection.safetensors"
SITES_FOLDER, POOLED_FILE = "sites", "pooled.safetensors"
DEADLINE_SECONDS = 3600.0
REFUSED_EVENT = "no_sum"
"""Of the run's log: why masked statistics could not be added up."""


@dataclass(frozen=True)
class StatisticsQuestion:
    """What the evaluator wants to know."""

    query: StatisticsQuery
    width: int
    """Of the features; answers of another width are refused."""
    projection: Path | None = None


@dataclass(frozen=True)
class StoredQuestion:
    """The same in the folder of its run."""

    query: StatisticsQuery
    width: int
    projection: Projection | None
    sent: bytes
    """The projection's file, as it travels; empty without one."""

    @property
    def nothing(self) -> Statistics:
        """Statistics of no image, of the kind that is asked for: what adds to them adds to every good answer."""
        projection = self.projection
        width = self.width if projection is None else projection.basis_DP.shape[1]
        facts = {} if projection is None else noise_facts(projection.radius, self.query.noise_multiplier)
        return Statistics(
            space=self.query.space if projection is None else projection.projected_space,
            n=0,
            total_D=np.zeros(width),
            outer_DD=np.zeros((width, width)),
            release=self.query.kind,
            images=facts,
        )

    def record(self, query: StatisticsQuery) -> RecordDict:
        """The question as it travels, with the query as it is or with a roster in it."""
        arrays = {"file": Array(np.frombuffer(self.sent, np.uint8))} if self.sent else {}
        return RecordDict({"arrays": ArrayRecord(arrays), "header": header_record(query)})


class _StatisticsFile(Section):
    """The file that tells the ServerApp what to ask."""

    query: StatisticsQuery
    width: int = Field(ge=1)


def question_for(
    release: Literal["exact", "dp"],
    noise_multiplier: float,
    projection: Path | None,
    space: FeatureSpace,
    width: int,
) -> StatisticsQuestion:
    """The question for statistics in `space` of `width` dimensions, under a new name.

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
    return StatisticsQuestion(query, width, projection)


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
    write_question(run.path, question)
    outcomes = submit(
        home,
        experiment,
        question.query.run,
        "statistics",
        say,
        poll_seconds=poll_seconds,
        deadline_seconds=DEADLINE_SECONDS,
    )
    pooled_file = run.path / POOLED_FILE
    if experiment.federation.secure:
        if not pooled_file.exists():
            ends = [event["reason"] for event in read_metrics(run.metrics) if event["kind"] == REFUSED_EVENT]
            raise InputError(f"no sum of statistics: {'; '.join(ends) or 'see `maskfed-server logs`'}")
        return pooled_file
    files = sorted((run.path / SITES_FOLDER).glob("*.safetensors"))
    if not files:
        raise InputError(f"no site released statistics: {reasons(outcomes)}")
    pooled = functools.reduce(operator.add, (load_statistics(file) for file in files))
    save_statistics(pooled, pooled_file)
    return pooled_file


def write_question(folder: Path, question: StatisticsQuestion) -> None:
    """Put the question into the folder of its run, where `gather` finds it."""
    asked = _StatisticsFile(query=question.query, width=question.width)
    write_atomically(folder / QUESTION_FILE, asked.model_dump_json(indent=2) + "\n")
    if question.projection is not None:
        write_atomically(folder / PROJECTION_FILE, question.projection.read_bytes())


def read_question(folder: Path) -> StoredQuestion:
    """What `write_question` has put into the folder of a run."""
    asked = _StatisticsFile.model_validate_json((folder / QUESTION_FILE).read_text(encoding="utf-8"))
    file = folder / PROJECTION_FILE
    projection, sent = (load_projection(file), file.read_bytes()) if file.exists() else (None, b"")
    return StoredQuestion(asked.query, asked.width, projection, sent)


def gather(
    grid: Grid,
    home: Path,
    folder: Path,
    experiment: Experiment,
    timing: Timing | None = None,
    deadline_seconds: float = DEADLINE_SECONDS,
) -> None:
    """Ask, and write what comes: `sites/<alias>.safetensors`, and one line per site in the run log.

    Args:
        grid: Flower's.
        home: the coordinator's folder.
        folder: of the question's run.
        experiment: its `federation.max_examples` bounds how many images a site may claim.
        timing: seconds between pulls, deadlines of calls.
        deadline_seconds: for the answers.

    Raises:
        ExchangeError: the SuperLink does not answer, or does not take the question.
    """
    asked = read_question(folder)
    nothing = asked.nothing
    collect(
        grid,
        home,
        asked.record(asked.query),
        MessageType.QUERY,
        lambda message, alias: _take(
            message, nothing, alias, folder / SITES_FOLDER, experiment.federation.max_examples
        ),
        RunLog(folder / "metrics.jsonl"),
        "statistics",
        timing=timing,
        deadline_seconds=deadline_seconds,
        reply_bytes=MAX_FILE_BYTES,
    )


def _take(message: Message, nothing: Statistics, alias: str, folder: Path, most_images: int) -> tuple[str, str]:
    """Check an answer and keep its statistics; its outcome and reason.

    Raises:
        InputError: the answer does not follow the protocol, or its numbers would spoil the sum.
    """
    answer = validated(StatisticsAnswer, read_header(message.content))
    if answer.status == "refused":
        return "refused", answer.reason
    statistics = parse_statistics(read_bytes(message.content, "file", MAX_FILE_BYTES), alias)
    facts = validated(ReleasedFacts, {name: clean(getattr(statistics, name)) for name in ReleasedFacts.model_fields})
    if facts.site != alias or facts.release != nothing.release:
        raise InputError(f"the statistics say site {facts.site!r}, release {facts.release!r}")
    if facts.n > most_images:
        raise InputError(
            f"{facts.n:g} images, federation.max_examples takes a site for at most {most_images}: raise it"
        )
    if statistics.total_D.shape != nothing.total_D.shape:
        raise InputError(f"features of width {len(statistics.total_D)}, {len(nothing.total_D)} was asked for")
    statistics = replace(statistics, source=facts.source, images=facts.images)
    _ = nothing + statistics
    save_statistics(statistics, folder / f"{alias}.safetensors")
    return "released", ""
