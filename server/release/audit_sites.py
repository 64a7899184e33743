"""Audits of a checkpoint at the sites: send the model and public references, keep the verdicts beside the run.

`ask_audits` runs in the operator's command; `gather_verdicts` runs in the ServerApp of the question's run. What a site
answers are verdicts on noisy counts, or the outcome of canaries. No torch but for what the command computes itself.
"""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MessageType, RecordDict

from server.federation.messaging.question import collect, reasons, submit
from server.federation.messaging.transport import Grid, Timing
from server.release.audit_question import AuditPlan, make_question
from server.release.verdict_files import VERDICT_SCHEMA, add_verdicts
from server.runs.history import read_run
from server.runs.run_directory import RunDir, create
from shared.errors import InputError
from shared.experiment.config import Section
from shared.messages.audit import (
    AUDIT_ACTION,
    MODEL_ARRAY,
    AuditAnswer,
    AuditQuery,
    reference_array,
)
from shared.messages.envelope import header_record, read_header, validated
from shared.storage.checkpoint import check_files, resolve_checkpoint
from shared.storage.files import write_atomically
from shared.storage.runlog import RunLog
from shared.storage.versions import installed_versions

AUDIT_FILE, SITES_FOLDER = "audit.json", "sites"


class _AuditFile(Section):
    """The file that tells the ServerApp what to ask of whom."""

    query: AuditQuery
    sites: tuple[str, ...]
    deadline_seconds: float


def ask_audits(
    home: Path,
    path: Path,
    plan: AuditPlan,
    say: Callable[[str], None] = lambda _: None,
    poll_seconds: float = 1.0,
) -> list[Path]:
    """Ask sites to audit a checkpoint, and keep their verdicts in its run, for the release gate and the report.

    Args:
        home: the coordinator's folder, with a running SuperLink.
        path: checkpoint folder of a run, or a run directory (its newest).
        plan: what is asked.
        say: told who answered and who refused, and why.
        poll_seconds: between two looks at the question's run.

    Returns:
        The verdict files.

    Raises:
        InputError: bad checkpoint or reference, or nobody gave a verdict, and why.
        ControlError: the SuperLink cannot be reached, or the question did not end in time.
    """
    checkpoint = resolve_checkpoint(path)
    run = RunDir(checkpoint.resolve().parent.parent)
    if checkpoint.resolve().parent.name != "checkpoints" or not run.experiment_file.exists():
        raise InputError(f"checkpoint {checkpoint} lies in no run, so nobody took part in it: name a run's checkpoint")
    question = make_question(checkpoint, plan, run.path.name)
    sites = plan.sites or tuple(read_run(run.path).participants(check_files(checkpoint).round or 0))
    asked = create(home / "runs" / question.query.run, question.query.experiment)
    for name, flat in question.arrays.items():
        np.save(asked.path / f"{name}.npy", flat, allow_pickle=False)
    record = _AuditFile(query=question.query, sites=sites, deadline_seconds=plan.deadline_seconds)
    write_atomically(asked.path / AUDIT_FILE, record.model_dump_json(indent=2) + "\n")
    try:
        outcomes = submit(
            home,
            question.query.experiment,
            question.query.run,
            "audit",
            say,
            poll_seconds=poll_seconds,
            deadline_seconds=plan.deadline_seconds,
        )
    finally:
        # As large as the models; the digests stay in the question.
        for name in question.arrays:
            (asked.path / f"{name}.npy").unlink(missing_ok=True)
    files = sorted((asked.path / SITES_FOLDER).glob("*.json"))
    if not files:
        raise InputError(f"no site gave a verdict: {reasons(outcomes)}")
    return add_verdicts(run.path, files)


def gather_verdicts(grid: Grid, home: Path, folder: Path, timing: Timing | None = None) -> None:
    """Ask, and write what comes: `sites/<alias>-<audit>.json`, and one line per site in the run log."""
    asked = _AuditFile.model_validate_json((folder / AUDIT_FILE).read_text(encoding="utf-8"))
    references = [reference_array(number) for number in range(len(asked.query.reference_digests))]
    names = [MODEL_ARRAY, *references] if asked.query.evidence == "counts" else []
    arrays = {name: Array(np.load(folder / f"{name}.npy", allow_pickle=False)) for name in names}
    record = RecordDict({"arrays": ArrayRecord(arrays), "header": header_record(asked.query)})
    collect(
        grid,
        home,
        record,
        f"{MessageType.QUERY}.{AUDIT_ACTION}",
        lambda message, alias: _take(message, asked.query, alias, folder / SITES_FOLDER),
        RunLog(folder / "metrics.jsonl"),
        "audit",
        only=asked.sites,
        timing=timing,
        deadline_seconds=asked.deadline_seconds,
    )


def _take(message: Message, query: AuditQuery, alias: str, folder: Path) -> tuple[str, str]:
    """Check an answer and keep its verdicts; its outcome and reason.

    Site and checkpoint are what the coordinator knows of whom and what it asked, never what the answer says.

    Raises:
        MessageError: the answer does not follow the protocol.
    """
    answer = validated(AuditAnswer, read_header(message.content))
    if answer.status == "refused":
        return "refused", f"{answer.refusal}: {answer.reason}"
    expected = {"canaries"} if query.evidence == "canaries" else {"membership", "memorisation"}
    if {verdict.audit for verdict in answer.verdicts} != expected:
        return "rejected", f"an answer with other verdicts than {' and '.join(sorted(expected))}"
    known = {
        "site": alias,
        "checkpoint": query.checkpoint,
        "checkpoint_digest": query.checkpoint_digest,
        "schema": VERDICT_SCHEMA,
        "references": list(query.reference_digests),
        "versions": installed_versions(),
        "time": datetime.now(UTC).isoformat(timespec="minutes"),
    }
    folder.mkdir(exist_ok=True)
    for verdict in answer.verdicts:
        text = json.dumps({**known, **verdict.model_dump(mode="json")}, indent=2) + "\n"
        write_atomically(folder / f"{alias}-{verdict.audit}.json", text)
    outcome = ", ".join(f"{verdict.audit} {'pass' if verdict.passed else 'FAIL'}" for verdict in answer.verdicts)
    return "audited", outcome
