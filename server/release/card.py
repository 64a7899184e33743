"""The model card of a release: what the weights come from, how good and how private they are, who took part."""

import re
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from server.report.formatting import format_interval, format_number, reference_label
from server.runs.history import Evaluation
from server.runs.lineage import MeanImageCharge
from server.runs.run_directory import RunDir
from shared.errors import InputError
from shared.messages.text import escape_markdown
from shared.storage.checkpoint import CheckpointMeta, load_meta


@dataclass(frozen=True)
class Evidence:
    """What is known of one checkpoint, and what keeps it from being released."""

    digest: str
    evaluations: list[Evaluation]
    audits: list[dict[str, Any]]
    sites: list[str]
    epsilons: list[dict[str, str]]
    problems: list[str]
    """One line per missing or failed requirement; empty: free to go."""
    num_changed: int = 0
    """Rounds that changed the weights."""
    pretraining: str = ""
    """What the training started from; empty: from random weights."""
    mean_images: tuple[MeanImageCharge, ...] = ()
    """What sites were charged for images that the weights were trained on."""


def without_names(evidence: Evidence) -> Evidence:
    """The same with numbers for sites, everywhere: who takes part in a federation is not for everybody to know."""
    named = {str(each.get("site")) for each in [*evidence.audits, *evidence.epsilons]}
    numbers = {site: f"site {number}" for number, site in enumerate(sorted({*evidence.sites, *named}), 1)}
    words = re.compile("|".join(rf"(?<![\w-]){re.escape(site)}(?![\w-])" for site in sorted(numbers, key=len)[::-1]))

    def hide(text: str) -> str:
        return words.sub(lambda found: numbers[found[0]], text) if numbers else text

    return replace(
        evidence,
        sites=[numbers[site] for site in evidence.sites],
        audits=[{**each, "site": hide(str(each["site"])), "reason": hide(each["reason"])} for each in evidence.audits],
        epsilons=[{**each, "site": numbers[each["site"]]} for each in evidence.epsilons],
        problems=[hide(problem) for problem in evidence.problems],
    )


def pretraining_of(run: RunDir, meta: CheckpointMeta) -> str:
    """What a run started from, as far as the checkpoint that it names is still there: objective, images, digest."""
    if not meta.parents:
        return ""
    named = run.stored_settings.get("init") or meta.experiment.train.init
    try:
        start = load_meta(Path(str(named)))
    except (InputError, OSError, ValueError):
        start = None
    if start is None or start.digest not in meta.parents:
        return f"checkpoint `{meta.parents[0]}`"
    facts, train = start.provenance, start.experiment.train
    data, count = str(facts.get("data") or ""), facts.get("num_images")
    where = data if data.startswith("synthetic:") else Path(data).name
    images = f" on {format_number(count)} public images ({escape_markdown(where)})" if isinstance(count, int) else ""
    steps = "" if start.step is None else f", {start.step:,} steps of {train.batch} images"
    return f"objective {train.objective}{images}{steps}, checkpoint `{start.digest}`"


def model_card(
    name: str, meta: CheckpointMeta, evidence: Evidence, override: str, license_text: str, *, names_sites: bool
) -> str:
    """The card, in Markdown."""
    environment = Environment(
        loader=PackageLoader("server.release", "templates"),
        autoescape=False,  # Markdown
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    label = partial(reference_label, names_sites=names_sites)
    environment.filters |= {"number": format_number, "interval": format_interval, "label": label}
    return environment.get_template("model_card.md").render(
        name=name,
        experiment=meta.experiment,
        step=meta.step,
        rounds=meta.round,
        evidence=evidence,
        override=override,
        license=license_text,
        written=datetime.now(UTC).strftime("%Y-%m-%d"),
    )
