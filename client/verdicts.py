"""Verdicts of a site's audits: pass or fail may leave, figures only as a charged release."""

import json
import secrets
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from client.dataset import open_dataset
from client.journal import Journal
from client.ledger import open_ledger
from client.settings import Home, SiteConfig
from client.spending import Charge, EpsilonOf
from shared.errors import InputError
from shared.versions import installed_versions

SCHEMA_VERSION = 1
AuditKind = Literal["membership", "memorisation"]


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
        _charge(home, settings, digest, epsilon_of)
    out.mkdir(parents=True, exist_ok=True)
    for verdict in verdicts:
        text = json.dumps(verdict.as_json(with_figures=figures), indent=2) + "\n"
        (out / f"{verdict.site}-{verdict.audit}.json").write_text(text, encoding="utf-8")
    numbers = ["verdict", *(["figures"] if figures else [])]
    Journal(home.journal).write("release", task="audit", checkpoint_digest=digest, numbers=numbers)


def _charge(home: Home, settings: SiteConfig, digest: str, epsilon_of: EpsilonOf) -> None:
    """Record a release without DP before it happens.

    Raises:
        InputError: policy forbids it.
    """
    policy = settings.policy
    if "audit" not in policy.tasks:
        raise InputError("policy.tasks of site.toml does not list `audit`: figures stay here; add it to release them")
    data = open_dataset(home, settings.image_size)
    with open_ledger(home.ledger, Path(settings.head_file)) as ledger:
        if ledger.spending(data.dataset_id) and not policy.non_private_after_dp:
            raise InputError(
                "figures are a release without DP, and DP rounds have been made: policy.non_private_after_dp forbids it"
            )
        charge = Charge(
            dataset_id=data.dataset_id,
            fingerprint=data.fingerprint,
            task="audit",
            run=f"audit-{secrets.token_hex(4)}",
            server_round=0,
            request_digest=digest,
            plan_digest=digest,
            mechanism="none",
            remarks="audit figures",
        )
        entry, _ = ledger.reserve(charge, cap=policy.epsilon_cap, delta=policy.delta, epsilon_of=epsilon_of)
        ledger.commit(entry)
