"""`maskfed-server report`: one self-contained HTML page per run, or one that compares several."""

import base64
import io
import math
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from server.charts import Series, line_chart
from server.curves import write_curves
from server.rundata import OUTCOMES, Evaluation, RunData, read_run, spent_text
from server.rundir import RunDir
from shared.files import write_atomically
from shared.versions import installed_versions

GRID_COLUMNS, GRID_GAP = 8, 2
"""How `shared.sampling.save_grid` lays out the grids that evaluations write."""
STRIP_IMAGES, STRIP_PLACES = 8, 12
SYMBOLS = {"answered": "✓", "refused": "–", "failed": "!", "late": "…", "lost": "×", "rejected": "≠"}


@dataclass(frozen=True)
class Row:
    """One line of the distance table."""

    place: int
    value: float
    change: float | None
    """Percent against the first evaluation of the same metric and reference."""
    others: dict[str, float]
    evaluation: Evaluation


@dataclass
class Page:
    """One run, prepared for the template."""

    data: RunData
    metric: str = ""
    reference: str = ""
    rows: list[Row] = field(default_factory=list)
    other_rows: list[Row] = field(default_factory=list)
    charts: list[tuple[str, str]] = field(default_factory=list)
    first_last: list[tuple[str, str]] = field(default_factory=list)
    strip: str = ""
    strip_places: list[int] = field(default_factory=list)
    matrix: list[tuple[str, list[dict[str, str]]]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    epsilons: list[dict[str, Any]] = field(default_factory=list)
    traffic: list[dict[str, Any]] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)


def report(runs: list[Path], out: Path | None = None) -> Path:
    """Write the page, and the same figures for TensorBoard.

    Args:
        runs: run directories; several are compared.
        out: the HTML file; default: `report.html` in the run, or `comparison.html` beside the first of several.

    Returns:
        The file.

    Raises:
        InputError: a path that is no run directory, or a damaged result.
    """
    pages = [build_page(read_run(path)) for path in runs]
    for page in pages:
        write_curves(page.data)
    target = out or (RunDir(runs[0]).report if len(runs) == 1 else runs[0].resolve().parent / "comparison.html")
    environment = Environment(
        loader=PackageLoader("server", "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {
        "number": format_number,
        "bytes": format_bytes,
        "seconds": format_seconds,
        "spent": spent_text,
    }
    html = environment.get_template("report.html").render(
        pages=pages,
        comparison=_comparison(pages) if len(pages) > 1 else "",
        symbols=SYMBOLS,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        versions=installed_versions(),
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, html)
    return target


def build_page(data: RunData) -> Page:
    """Everything the template shows of one run."""
    page = Page(data)
    if data.main_group is not None:
        page.metric, page.reference = data.main_group
        page.rows = _rows([each for each in data.evaluations if each.group == data.main_group])
    for group in sorted({each.group for each in data.evaluations} - {data.main_group}):
        page.other_rows += _rows([each for each in data.evaluations if each.group == group])
    page.charts = _charts(page)
    _pictures(page)
    _federation(page)
    page.facts = _facts(data)
    return page


def _rows(evaluations: list[Evaluation]) -> list[Row]:
    rows = []
    for each in evaluations:
        first = evaluations[0].value
        change = None if each is evaluations[0] or not first else (each.value - first) / first * 100
        metrics = each.result["metrics"].items()
        others = {name: value for name, value in metrics if isinstance(value, float) and name != each.distance_name}
        rows.append(Row(each.place, each.value, change, others, each))
    return rows


# ---- Charts ----


def _charts(page: Page) -> list[tuple[str, str]]:
    data, charts = page.data, []
    if page.rows:
        line = distance_series(page, page.metric)
        charts.append((f"{page.metric} by {data.place}", line_chart([line], data.place, page.metric, from_zero=True)))
    if steps := data.of_kind("train"):
        loss = Series("loss", [event["step"] for event in steps], [event.get("loss") for event in steps])
        rate = [event.get("images_per_second") for event in steps]
        charts.append(("Training loss", line_chart([loss], "step", "loss", log_y=_is_wide(loss.y))))
        speed = Series("images/s", loss.x, rate)
        charts.append(("Speed", line_chart([speed], "step", "images / s", from_zero=True)))
    if losses := _site_losses(data):
        charts.append(("Loss at the sites", line_chart(losses, "round", "loss")))
    if data.rounds:
        x = [float(event["round"]) for event in data.rounds]
        norms = Series("update", x, [event.get("update_norm") for event in data.rounds])
        charts.append(("Size of the global update", line_chart([norms], "round", "L2 norm", from_zero=True)))
    return charts


def distance_series(page: Page, label: str) -> Series:
    """The headline distance of a run over rounds or steps, with its interval where one was asked for."""
    intervals = [row.evaluation.result.get("intervals", {}).get(page.metric) for row in page.rows]
    bars = [None if each is None else (float(each[0]), float(each[1])) for each in intervals]
    return Series(label, [float(row.place) for row in page.rows], [row.value for row in page.rows], bars)


def _site_losses(data: RunData) -> list[Series]:
    """Losses that sites released, one line each; most policies release none."""
    lines = []
    for site in data.sites:
        points = [
            (event["round"], entry.get("scalars", {}).get("loss"))
            for event in data.rounds
            for entry in event["answered"]
            if entry["site"] == site
        ]
        if any(loss is not None for _, loss in points):
            lines.append(Series(site, [place for place, _ in points], [loss for _, loss in points]))
    return lines


def _is_wide(values: list[float | None]) -> bool:
    positive = [value for value in values if value is not None and value > 0]
    return bool(positive) and max(positive) > 10 * min(positive)


def _comparison(pages: list[Page]) -> str:
    """Distances of several runs in one chart, where they measured the same thing."""
    measured = [page for page in pages if page.rows]
    groups = {(page.metric, page.reference, page.data.place) for page in measured}
    if len(groups) != 1:
        return ""
    lines = [distance_series(page, page.data.name) for page in measured]
    return line_chart(lines, measured[0].data.place, measured[0].metric, from_zero=True)


# ---- Pictures ----


def _pictures(page: Page) -> None:
    """The first and the last grid whole, and some images of each place side by side."""
    grids, place = page.data.grids, page.data.place
    if not grids:
        return
    ends = [grids[0], grids[-1]] if len(grids) > 1 else [grids[0]]
    page.first_last = [(f"{place} {number}", _embed(path.read_bytes())) for number, path in ends]
    if len(grids) > 2:
        keep = _spread(len(grids), STRIP_PLACES)
        page.strip_places = [grids[index][0] for index in keep]
        page.strip = _strip([grids[index][1] for index in keep], page.data.experiment.model.image_size)


def _strip(paths: list[Path], side: int) -> str:
    """A PNG with one column per place and one row per seed."""
    step = side + GRID_GAP
    canvas = Image.new("RGB", (len(paths) * step - GRID_GAP, STRIP_IMAGES * step - GRID_GAP), "white")
    for column, path in enumerate(paths):
        with Image.open(path) as grid:
            for row in range(STRIP_IMAGES):
                left, top = row % GRID_COLUMNS * step, row // GRID_COLUMNS * step
                canvas.paste(grid.crop((left, top, left + side, top + side)), (column * step, row * step))
    buffer = io.BytesIO()
    canvas.save(buffer, format="PNG", optimize=True)
    return _embed(buffer.getvalue())


def _spread(count: int, most: int) -> list[int]:
    """At most `most` indices of `count`, first and last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(index * (count - 1) / (most - 1)) for index in range(most)})


def _embed(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


# ---- Who took part, what it cost ----


def _federation(page: Page) -> None:
    rounds, sites = page.data.rounds, page.data.sites
    cells: dict[str, list[dict[str, str]]] = {site: [] for site in sites}
    spent: dict[str, dict[str, Any]] = {}
    for event in rounds:
        outcome = {entry["site"]: (state, entry) for state in OUTCOMES for entry in event.get(state, [])}
        for site in sites:
            state, entry = outcome.get(site, ("not asked", {}))
            reason = str(entry.get("reason") or entry.get("code") or "")
            cells[site].append({"state": state, "symbol": SYMBOLS.get(state, ""), "reason": reason})
            if state not in ("answered", "not asked"):
                page.problems.append(f"Round {event['round']}: {site} {state}{f': {reason}' if reason else ''}")
            if "epsilon" in entry:
                spent[site] = {"site": site, "round": event["round"], **entry}
        if not event.get("weights_changed", True):
            page.problems.append(f"Round {event['round']}: weights unchanged, {event.get('reason', '')}")
        seconds = event.get("seconds", {})
        page.traffic.append(
            {
                "round": event["round"],
                "sent": event.get("bytes_sent", 0),
                "received": event.get("bytes_received", 0),
                "total": seconds.get("total", sum(seconds.values())),
                "train": seconds.get("train"),
            }
        )
    page.matrix = list(cells.items())
    page.epsilons = [spent[site] for site in sorted(spent)]
    for event in page.data.of_kind("evaluation_failed"):
        page.problems.append(f"Evaluation of round {event.get('round')} failed: {event.get('reason', '')}")
    for event in page.data.of_kind("round_failed"):
        page.problems.append(f"Round {event['round']} gave no usable reply and was started again")


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
    else:
        done = max((event["step"] for event in data.of_kind("train")), default=0)
        facts.append(("Training", f"{done:,} of {train.steps:,} steps of {train.batch} images, learning rate "
                                  f"{experiment.optim.lr:g}"))  # fmt: skip
    if data.events:
        first, last = (event["time"][:19].replace("T", " ") for event in (data.events[0], data.events[-1]))
        facts.append(("Time", f"{first} to {last} UTC"))
    return facts


# ---- Numbers as text ----


def format_number(value: float | str | None) -> str:
    """Four significant digits; text stays, None becomes a dash."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 10_000 or value == int(value) else f"{value:.4g}"


def format_bytes(value: float) -> str:
    """With a decimal unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000 or unit == "GB":
            return f"{value:.3g} {unit}" if unit != "B" else f"{value:.0f} B"
        value /= 1000
    raise AssertionError("the last unit has returned")


def format_seconds(value: float | None) -> str:
    """Seconds below two minutes, else minutes or hours."""
    if value is None or not math.isfinite(value):
        return "–"
    if value < 120:
        return f"{value:.1f} s"
    return f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h"
