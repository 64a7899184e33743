"""One page per run for the data-protection officer: what the site's records show, and what only people can fill in.

After the record of processing activities (GDPR, Article 30) and the four questions of EDPB Opinion 28/2024 on AI models
(adopted on 17 December 2024). The page states what was recorded and measured here; whether that is enough is for the
controller to judge.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

from client.records.chain import Entry
from client.settings import SiteConfig
from shared.pages.assets import style
from shared.storage.code_digest import installed_digest
from shared.storage.versions import git_commit, installed_versions


@dataclass(frozen=True)
class RunRecord:
    """What a site has on record of one run."""

    run: str
    entries: list[Entry]
    """Of the journal: requests, and what was decided and released for them."""
    charges: list[dict[str, Any]]
    totals: dict[str, dict[str, Any]]
    """By data set, over all runs: epsilon (None: no bound), delta, unit, cap, whether it is unbounded."""
    ledger_head: str


class Release(NamedTuple):
    """One answer that left."""

    time: str
    what: str
    numbers: str
    size: str
    epsilon: str


class Kept(NamedTuple):
    """Something that stays at the site."""

    what: str
    why: str
    until: str


KEPT = (
    Kept("decoded images (cache)", "rounds read them", "leave --wipe, or the scan of another data set"),
    Kept(
        "ledger, and its head elsewhere",
        "what was spent must stay known as long as a model that was trained here may be in use",
        "for good",
    ),
    Kept("journal", "what was asked, decided and released", "for good"),
    Kept(
        "keyed hashes of files (ledger, registry)",
        "the same images must never get a new budget; without the site's key they tell nothing of a file",
        "for good",
    ),
    Kept("the last answer of each run", "the same request again costs nothing", "leave"),
    Kept("the optimizer's moments of the newest runs that keep them", "the next round goes on with them", "leave"),
    Kept("keys of the site", "identity", "leave"),
)
FIELDS = (
    ("Controller, and joint controllers if any (Art. 26)", 2),
    ("Data-protection officer", 1),
    ("Purpose in the controller's own words", 3),
    ("Legal basis (Art. 6), and for special categories Art. 9: faces may reveal health or origin", 2),
    ("Where the photographs come from, and what the people on them were told", 3),
    ("How access, objection and erasure are answered for images and for the model", 3),
    ("Transfers to third countries by the coordinator or the model's recipients", 2),
    ("Date, name, signature", 2),
)
"""What no program knows: label, and lines to write on."""


def record_page(settings: SiteConfig, record: RunRecord) -> str:
    """The page as HTML that needs nothing else and prints on A4; neither folders nor numbers of images are in it."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("client.operator", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    releases = [_release(entry, record.entries) for entry in record.entries if entry.kind == "release"]
    return environment.get_template("processing_record.html").render(
        style=Markup(style()),  # ours
        settings=settings,
        policy=settings.policy,
        record=record,
        first=_day(record, 0),
        last=_day(record, -1),
        releases=releases,
        refusals=[entry.fields for entry in record.entries if entry.kind == "refusal"],
        has_masks=any("masked" in release.numbers for release in releases),
        audits=[release for release in releases if "audit" in release.what],
        odds=_odds(record.totals),
        is_unbounded=any(total["is_unbounded"] for total in record.totals.values()),
        kept=KEPT,
        fields=FIELDS,
        code=installed_digest(),
        commit=git_commit() or "unknown",
        versions=installed_versions(),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _release(entry: Entry, entries: list[Entry]) -> Release:
    fields = entry.fields
    digest = fields.get("request_digest")
    asked: Mapping[str, Any] = next(
        (each.fields for each in entries if each.kind == "request" and each.fields.get("request_digest") == digest), {}
    )
    number = asked.get("server_round")
    what = str(fields.get("task") or asked.get("task") or "")
    size, epsilon = fields.get("bytes"), fields.get("epsilon")
    told = "unbounded" if fields.get("is_unbounded") else "" if epsilon is None else f"{epsilon:.3f}"
    return Release(
        f"{entry.time:%Y-%m-%d %H:%M}",
        what if number is None else f"{what}, round {number}",
        ", ".join(map(str, fields.get("numbers", ()))),
        "" if size is None else f"{size / 1e6:.1f}\N{NO-BREAK SPACE}MB",
        told,
    )


def _day(record: RunRecord, index: int) -> str:
    return f"{record.entries[index].time:%Y-%m-%d}" if record.entries else "not recorded"


def _odds(totals: Mapping[str, Mapping[str, Any]]) -> str:
    """The largest factor on the probability of any outcome, e to the epsilon; empty where nothing bounds it."""
    epsilons = [total["epsilon"] for total in totals.values()]
    if not epsilons or None in epsilons or any(total["is_unbounded"] for total in totals.values()):
        return ""
    return f"{math.exp(min(max(epsilons), 700.0)):.3g}"
