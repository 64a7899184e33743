"""One run made ready for the report's template: every table, chart and picture of it."""

from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from server.report.beside import Beside, read_beside
from server.report.formatting import reference_label
from server.report.pictures import ends, strip
from server.report.run_charts import Chart, distance_chart, epsilon_chart, training_charts
from server.runs.history import Evaluation, RunData
from shared.storage.round_records import dp_epsilon, named_text
from shared.storage.runlog import OUTCOMES

SYMBOLS = {"answered": "✓", "refused": "–", "failed": "!", "late": "…", "lost": "×", "rejected": "≠"}
MOST_CELLS = 20_000
"""Of the table of who took part: 100 sites and 2,000 rounds would be ten times as many, and ten megabytes."""


@dataclass(frozen=True)
class Row:
    """One line of the distance table."""

    place: int
    value: float
    change: float | None
    """Percent against the first evaluation of the same metric and reference."""
    others: dict[str, float]
    evaluation: Evaluation
    trend: str = ""
    """`down` or `up` where the interval is apart from the first one's; empty where they overlap or one is not known."""


@dataclass(frozen=True)
class AuditTable:
    """Verdicts on one checkpoint: a line per site, a column per kind."""

    checkpoint: str
    kinds: list[str]
    sites: list[tuple[str, dict[str, dict[str, Any]]]]


@dataclass
class Page:
    """One run, prepared for the template."""

    data: RunData
    beside: Beside | None = None
    metric: str = ""
    reference: str = ""
    rows: list[Row] = field(default_factory=list)
    others: list[list[Row]] = field(default_factory=list)
    """Further metrics and references, each with its own first and last."""
    charts: list[Chart] = field(default_factory=list)
    epsilon_chart: Chart | None = None
    first_last: list[tuple[str, str]] = field(default_factory=list)
    strip: str = ""
    strip_places: list[int] = field(default_factory=list)
    matrix: list[tuple[str, list[dict[str, str]]]] = field(default_factory=list)
    matrix_rounds: list[int] = field(default_factory=list)
    """The columns of `matrix`: the newest rounds, as many as a browser draws."""
    problems: list[str] = field(default_factory=list)
    epsilons: list[dict[str, Any]] = field(default_factory=list)
    audits: list[AuditTable] = field(default_factory=list)
    traffic: list[dict[str, Any]] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)


def build_page(data: RunData) -> Page:
    """Everything the template shows of one run."""
    page = Page(data, read_beside(data.path))
    groups = [list(group) for _, group in groupby(sorted(data.evaluations, key=_by_group), key=lambda one: one.group)]
    groups.sort(key=lambda group: group[0].group != data.main_group)
    if groups:
        page.metric, page.reference = groups[0][0].distance_name, reference_label(groups[0][0].result["reference"])
        page.rows, *page.others = [_rows(group) for group in groups]
    page.charts = [*distance_chart(data, groups), *training_charts(data)]
    _pictures(page)
    if data.damage:
        page.problems.append(f"metrics.jsonl: {data.damage}")
    _federation(page)
    page.epsilon_chart = epsilon_chart(data)
    page.audits = _audits(data.audits)
    page.facts = _facts(data)
    return page


def _by_group(evaluation: Evaluation) -> tuple[tuple[str, ...], int]:
    return evaluation.group, evaluation.place


def _rows(evaluations: list[Evaluation]) -> list[Row]:
    rows = []
    for each in evaluations:
        first = evaluations[0].value
        change = None if each is evaluations[0] or not first else (each.value - first) / first * 100
        metrics = each.result["metrics"].items()
        others = {name: value for name, value in metrics if isinstance(value, float) and name != each.distance_name}
        rows.append(Row(each.place, each.value, change, others, each, _trend(evaluations[0].interval, each.interval)))
    return rows


def _trend(first: list[float] | None, last: list[float] | None) -> str:
    """What two 95 percent intervals allow to say; most of what looks like progress is the draw of the images."""
    if first is None or last is None:
        return ""
    return "down" if last[1] < first[0] else "up" if last[0] > first[1] else ""


def _pictures(page: Page) -> None:
    grids, place = page.data.grids, page.data.place
    if not grids:
        return
    page.first_last = [(f"{place} {number}", picture) for number, picture in ends(grids)]
    if len(grids) > 2:
        page.strip_places, page.strip = strip(grids, page.data.experiment.model.image_size)


def _federation(page: Page) -> None:
    """Who took part, what went wrong, what was spent, what it cost."""
    cells: dict[str, list[dict[str, str]]] = {site: [] for site in page.data.sites}
    spent: dict[str, dict[str, Any]] = {}
    numbers = [event["round"] for event in page.data.rounds]
    page.matrix_rounds = numbers[-max(1, MOST_CELLS // max(1, len(cells))) :]
    shown = set(page.matrix_rounds)
    for event in page.data.rounds:
        outcome: dict[str, tuple[str, dict[str, Any]]] = {
            entry["site"]: (state, entry) for state in OUTCOMES for entry in event.get(state, [])
        }
        for site in page.data.sites:
            state, entry = outcome.get(site, ("not asked", {}))
            reason = str(entry.get("reason") or entry.get("code") or "")
            if event["round"] in shown:
                cells[site].append({"state": state, "symbol": SYMBOLS.get(state, ""), "reason": reason})
            if state not in ("answered", "not asked"):
                page.problems.append(f"Round {event['round']}: {site} {state}{f': {reason}' if reason else ''}")
            if "epsilon" in entry:
                spent[site] = {"site": site, "round": event["round"], **entry, "share": _share(entry)}
        if "forged" in event:
            page.problems.append(f"Round {event['round']}: {event['forged']['count']} forged messages dropped")
        for site in event.get("named", []):
            page.problems.append(f"Round {event['round']}: {named_text(site, event)}")
        if not event.get("weights_changed", True):
            page.problems.append(f"Round {event['round']}: weights unchanged, {event.get('reason', '')}")
        page.traffic.append(_costs(event))
    page.matrix = list(cells.items())
    page.epsilons = [spent[site] for site in sorted(spent)]
    for event in page.data.of_kind("evaluation_failed"):
        page.problems.append(f"Evaluation of round {event.get('round')} failed: {event.get('reason', '')}")
    for event in page.data.of_kind("round_failed"):
        page.problems.append(f"Round {event['round']} gave no usable reply and was started again")


def _share(entry: dict[str, Any]) -> float | None:
    """Percent of the cap that the releases with DP have used; None where there is no cap or nothing was spent so."""
    value, cap = dp_epsilon(entry), entry.get("epsilon_cap")
    return None if value is None or not cap else min(100.0, 100 * value / cap)


def _costs(event: dict[str, Any]) -> dict[str, Any]:
    seconds = event.get("seconds", {})
    return {
        "round": event["round"],
        "sent": event.get("bytes_sent", 0),
        "received": event.get("bytes_received", 0),
        "total": seconds.get("total", sum(seconds.values())),
        "train": seconds.get("train"),
    }


def _audits(verdicts: list[dict[str, Any]]) -> list[AuditTable]:
    """One table per audited checkpoint, the newest first."""
    tables = []
    for checkpoint in sorted({str(each.get("checkpoint", "–")) for each in verdicts}, reverse=True):
        own = [each for each in verdicts if str(each.get("checkpoint", "–")) == checkpoint]
        kinds = sorted({str(each.get("audit", "–")) for each in own})
        by_site: dict[str, dict[str, dict[str, Any]]] = {}
        for each in own:
            by_site.setdefault(str(each.get("site", "–")), {})[str(each.get("audit", "–"))] = each
        tables.append(AuditTable(checkpoint, kinds, sorted(by_site.items())))
    return tables


def _facts(data: RunData) -> list[tuple[str, str]]:
    experiment = data.experiment
    model, train, federation, privacy = experiment.model, experiment.train, experiment.federation, experiment.privacy
    mask = experiment.mask
    masked = f", {mask.kind} mask, {experiment.realised_mask_ratio:.3g} hidden" if mask.kind != "none" else ""
    facts = [
        ("Status", data.status),
        ("Model", f"{model.backbone} {model.size}, {model.image_size} px, patch {model.patch_size}"),
        ("Objective", f"{train.objective}{masked}, {experiment.diffusion.schedule} schedule"),
    ]
    if data.is_federated:
        rounds = f"{len(data.rounds)} of {federation.rounds} rounds, {federation.local_steps} local steps"
        facts.append(("Federation", f"{rounds}, {federation.server_optimizer}, {len(data.sites)} sites"))
        dp = f"DP-SGD, noise {privacy.noise_multiplier:g}, q {privacy.sample_rate:g}, unit {privacy.unit}"
        facts.append(("Privacy", dp if privacy.mechanism != "none" else "none: every site's epsilon is unbounded"))
        if federation.secure:
            facts.append(("Released", "masked updates, each of no use alone: the coordinator saw the rounds' sums"))
    else:
        done = max((event["step"] for event in data.of_kind("train")), default=0)
        facts.append(("Training", f"{done:,} of {train.steps:,} steps of {train.batch} images, learning rate "
                                  f"{experiment.optim.lr:g}"))  # fmt: skip
    if data.events:
        first, last = (event["time"][:19].replace("T", " ") for event in (data.events[0], data.events[-1]))
        facts.append(("Time", f"{first} to {last} UTC"))
    return facts
