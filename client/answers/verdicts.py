"""Verdicts of a site's audits: every one that leaves the site is charged before."""

import json
import secrets
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from client.answers.audit_power import too_few
from client.data.dataset import Dataset, open_dataset
from client.home import Home
from client.policy.budget import has_dp_releases
from client.records.journal import Journal
from client.records.ledger import Ledger, open_ledger
from client.records.spending import Charge, EpsilonOf
from client.settings import SiteConfig, SitePolicy
from shared.errors import InputError
from shared.messages.audit import AuditKind
from shared.storage.versions import installed_versions

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Verdict:
    """Outcome of one audit."""

    site: str
    audit: AuditKind
    checkpoint: str
    checkpoint_digest: str
    passed: bool
    reason: str
    """Why it failed, without any figure; empty when it passed."""
    figures: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        """The verdict as written to a file."""
        facts = {**asdict(self), "schema": SCHEMA_VERSION, "versions": installed_versions()}
        facts["time"] = datetime.now(UTC).isoformat(timespec="minutes")
        return facts


def audit_charge(data: Dataset, policy: SitePolicy, run: str, request_digest: str, *, is_exact: bool = False) -> Charge:
    """What an audit costs: one step of Gaussian noise on its counts; exact figures have no bound.

    Args:
        data: whose units are counted.
        policy: gives the noise, and the unit.
        run: the training run whose model is audited.
        request_digest: of the question.
        is_exact: the operator releases exact figures.
    """
    charge = Charge(
        dataset_id=data.dataset_id,
        fingerprint=data.fingerprint,
        task="audit",
        run=run,
        server_round=0,
        request_digest=request_digest,
        plan_digest=request_digest,
        mechanism="none" if is_exact else "gaussian",
        remarks="audit figures" if is_exact else "audit counts",
    )
    if is_exact:
        return charge
    noise = policy.audit.noise_multiplier
    gaussian = {"noise_multiplier": noise, "sample_rate": 1.0, "steps": 1, "unit": policy.unit}
    return charge.model_copy(update=gaussian)


def check_exact(policy: SitePolicy, data: Dataset, ledger: Ledger) -> None:
    """Whether exact figures, a release without DP, may leave.

    Raises:
        InputError: naming the rule that forbids it.
    """
    if "audit" not in policy.tasks:
        raise InputError("policy.tasks of site.toml does not list `audit`: figures stay here; add it to release them")
    if policy.require_dp:
        raise InputError("figures are a release without DP: policy.require_dp forbids it")
    if has_dp_releases(ledger.charges_of(data.dataset_id)) and not policy.non_private_after_dp:
        raise InputError(
            "figures are a release without DP, and DP rounds have been made: policy.non_private_after_dp forbids it"
        )


def charge_operator(home: Home, settings: SiteConfig, digest: str, *, figures: bool, epsilon_of: EpsilonOf) -> None:
    """Charge what the operator is about to write for the coordinator: counts, or exact figures.

    Raises:
        InputError: the policy or the budget forbids it; nothing was charged.
    """
    policy = settings.policy
    with open_ledger(home.ledger, Path(settings.head_file)) as ledger:
        data = open_dataset(home, settings.image_size)
        if figures:
            check_exact(policy, data, ledger)
        elif problem := too_few(data, policy.unit, policy.audit):
            raise InputError(problem)
        cost = audit_charge(data, policy, f"audit-{secrets.token_hex(4)}", digest, is_exact=figures)
        entry, _ = ledger.reserve(cost, cap=policy.epsilon_cap, delta=policy.delta, epsilon_of=epsilon_of)
        ledger.commit(entry)


def write_verdicts(home: Home, verdicts: list[Verdict], out: Path) -> None:
    """Write what the coordinator gets, already charged: one file for each audit, figures as numbers only."""
    out.mkdir(parents=True, exist_ok=True)
    for verdict in verdicts:
        text = json.dumps(verdict.as_json(), indent=2) + "\n"
        (out / f"{verdict.site}-{verdict.audit}.json").write_text(text, encoding="utf-8")
    note_release(Journal(home.journal), verdicts)


def note_release(journal: Journal, verdicts: list[Verdict], request_digest: str = "") -> None:
    """Record what leaves; `request_digest` when the coordinator has asked."""
    numbers = [f"{verdict.audit} {name}" for verdict in verdicts for name in ("verdict", *sorted(verdict.figures))]
    asked = {"request_digest": request_digest} if request_digest else {}
    journal.write("release", task="audit", checkpoint_digest=verdicts[0].checkpoint_digest, numbers=numbers, **asked)
