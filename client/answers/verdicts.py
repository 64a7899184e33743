"""Verdicts of a site's audits: pass or fail may leave, figures only as a charged release."""

import json
import secrets
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from client.data.dataset import Dataset, open_dataset
from client.records.journal import Journal
from client.records.ledger import Ledger, open_ledger
from client.records.spending import Charge, EpsilonOf
from client.settings import Home, SiteConfig, SitePolicy
from shared.errors import InputError
from shared.messages.audit import AuditKind
from shared.storage.versions import installed_versions

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Verdict:
    """Outcome of one audit; without `figures` it is what may leave the site."""

    site: str
    audit: AuditKind
    checkpoint: str
    checkpoint_digest: str
    passed: bool
    reason: str
    """Why it failed, without any figure; empty when it passed."""
    figures: dict[str, Any]

    def as_json(self, *, with_figures: bool) -> dict[str, Any]:
        """The verdict as written to a file."""
        facts = {**asdict(self), "schema": SCHEMA_VERSION, "versions": installed_versions()}
        facts["time"] = datetime.now(UTC).isoformat(timespec="minutes")
        return facts if with_figures else {**facts, "figures": {}}


def release_verdicts(
    home: Home, settings: SiteConfig, verdicts: list[Verdict], out: Path, *, figures: bool, epsilon_of: EpsilonOf
) -> None:
    """Write what the coordinator gets; figures are a release without DP and are charged before they are written.

    Args:
        home: the site.
        settings: its policy decides whether figures may leave.
        verdicts: of one model.
        out: folder for the files.
        figures: whether figures go with the verdicts.
        epsilon_of: the accountant.

    Raises:
        InputError: policy forbids the release of figures.
    """
    digest = verdicts[0].checkpoint_digest
    if figures:
        policy = settings.policy
        if "audit" not in policy.tasks:
            raise InputError(
                "policy.tasks of site.toml does not list `audit`: figures stay here; add it to release them"
            )
        data = open_dataset(home, settings.image_size)
        with open_ledger(home.ledger, Path(settings.head_file)) as ledger:
            if policy.require_dp:
                raise InputError("figures are a release without DP: policy.require_dp forbids it")
            if ledger.spending(data.dataset_id) and not policy.non_private_after_dp:
                raise InputError(
                    "figures are a release without DP, and DP rounds have been made: policy.non_private_after_dp "
                    "forbids it"
                )
            charge_figures(ledger, data, policy, f"audit-{secrets.token_hex(4)}", digest, epsilon_of)
    out.mkdir(parents=True, exist_ok=True)
    for verdict in verdicts:
        text = json.dumps(verdict.as_json(with_figures=figures), indent=2) + "\n"
        (out / f"{verdict.site}-{verdict.audit}.json").write_text(text, encoding="utf-8")
    note_release(Journal(home.journal), digest, figures=figures)


def charge_figures(
    ledger: Ledger, data: Dataset, policy: SitePolicy, run: str, request_digest: str, epsilon_of: EpsilonOf
) -> None:
    """Record figures as a release without DP, before they leave: the total becomes unbounded."""
    charge = Charge(
        dataset_id=data.dataset_id,
        fingerprint=data.fingerprint,
        task="audit",
        run=run,
        server_round=0,
        request_digest=request_digest,
        plan_digest=request_digest,
        mechanism="none",
        remarks="audit figures",
    )
    entry, _ = ledger.reserve(charge, cap=policy.epsilon_cap, delta=policy.delta, epsilon_of=epsilon_of)
    ledger.commit(entry)


def note_release(journal: Journal, checkpoint_digest: str, *, figures: bool, request_digest: str = "") -> None:
    """Record what leaves; `request_digest` when the coordinator has asked."""
    numbers = ["verdict", *(["figures"] if figures else [])]
    asked = {"request_digest": request_digest} if request_digest else {}
    journal.write("release", task="audit", checkpoint_digest=checkpoint_digest, numbers=numbers, **asked)


def num_asked_since(journal: Journal, moment: datetime) -> int:
    """Audits that were answered to the coordinator after `moment`."""
    return sum(
        entry.kind == "release"
        and entry.fields.get("task") == "audit"
        and "request_digest" in entry.fields
        and entry.time > moment
        for entry in journal.entries()
    )
