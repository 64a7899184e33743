"""What a site shows elsewhere of a run: what it was asked, did, spent and released, in one signed file."""

import json
import math
from pathlib import Path
from typing import Any

from client.home import Home
from client.operator.processing_record import RunRecord, record_page
from client.policy.approval import read_approved
from client.records.chain import Entry
from client.records.journal import Journal
from client.records.ledger import read_ledger
from client.records.spending import Charge, EpsilonOf, Total
from client.settings import CURE_SIGNING_KEY, SiteConfig
from shared.errors import InputError
from shared.evidence.bundle import write_bundle
from shared.messages.signature import public_text, read_key
from shared.storage.files import write_atomically

MEANING = (
    "Each line of `charges` was written to disk before its computation began and counts as spent whether or not it was "
    "completed. `totals` bound, at the site's delta, what everything that was ever released of a data set tells about "
    "one unit added or removed: PRV accountant (arXiv 2106.02848), an upper bound; `unbounded` after a release without "
    "DP. They cover all runs, not this one alone. Units: an image, or a person as the operator has confirmed it."
)


def write_evidence(
    home: Home, settings: SiteConfig, run: str, out: Path, epsilon: EpsilonOf, record: Path | None = None
) -> str:
    """Write the evidence of `run` to `out`, signed with the site's signing key.

    Images, their number, files and folders are not in it, nor decisions about other runs. The site's alias is. With
    `record` the page for the data-protection officer, which is in it, is also written to a file of its own.

    Returns:
        The public key that checks it: what the coordinator knows the site by.

    Raises:
        InputError: nothing of such a run is on record, a record is damaged, or a file exists.
    """
    for option, file in (("--out", out), ("--record", record)):
        if file is not None and file.exists():
            raise InputError(f"{option} {file} exists: name a new file")
    key = read_key(home.signing_key, CURE_SIGNING_KEY)
    told = gather(home, settings, run, epsilon)
    page = record_page(settings, told).encode()
    files: dict[str, bytes] = {
        "spending.json": _json({"what": MEANING, "charges": told.charges, "totals": told.totals}),
        "journal.json": _json(
            [{**entry.fields, "time": entry.time.isoformat(), "kind": entry.kind} for entry in told.entries]
        ),
        "policy.json": settings.policy.model_dump_json(indent=1, exclude={"extractors"}).encode(),
        "approved_code.json": _json(sorted(read_approved(home).code)),
        "processing_record.html": page,
    }
    facts = {"kind": "site", "site": settings.alias, "run": run, "ledger_head": told.ledger_head}
    write_bundle(out, key, facts, files)
    if record is not None:
        write_atomically(record, page)
    return public_text(key)


def gather(home: Home, settings: SiteConfig, run: str, epsilon: EpsilonOf) -> RunRecord:
    """What journal and ledger of a site say of one run, checked.

    Raises:
        InputError: nothing of such a run is on record, or a record is damaged.
    """
    asked = _entries_of(run, Journal(home.journal).entries())
    history = read_ledger(home.ledger)
    charges = [(entry, charge) for entry, charge in history.charges if charge.run == run]
    if not asked and not charges:
        raise InputError(f"nothing of a run {run!r} is in {home.journal}: see `maskfed-client journal show`")
    totals = {
        name: _told(history.total(name, settings.policy.delta, epsilon)) | {"cap": settings.policy.epsilon_cap}
        for name in dict.fromkeys(charge.dataset_id for _, charge in charges)
    }
    rows = [_row(entry, charge, is_done=entry.sequence in history.committed) for entry, charge in charges]
    return RunRecord(run, asked, rows, totals, history.entries[-1].hash if history.entries else "")


def _entries_of(run: str, entries: list[Entry]) -> list[Entry]:
    """Requests of a run, and what was decided and released for them."""
    named = [entry for entry in entries if run in (entry.fields.get("run"), entry.fields.get("audited_run"))]
    requests = {entry.fields.get("request_digest") for entry in named} - {None}
    return [entry for entry in entries if entry in named or entry.fields.get("request_digest") in requests]


def _told(total: Total) -> dict[str, Any]:
    """A total as JSON has it: no number where nothing bounds it."""
    return vars(total) | {"epsilon": total.epsilon if math.isfinite(total.epsilon) else None}


def _row(entry: Entry, charge: Charge, *, is_done: bool) -> dict[str, Any]:
    kept = ("task", "server_round", "mechanism", "noise_multiplier", "sample_rate", "steps", "unit", "dataset_id")
    told = charge.model_dump(mode="json")
    return {"time": entry.time.isoformat(), "is_completed": is_done, **{name: told[name] for name in kept}}


def _json(content: object) -> bytes:
    return json.dumps(content, indent=1).encode()
