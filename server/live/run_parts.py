"""The parts of the coordinator's live page that tell of one run."""

import datetime as dt
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from server.live.figures import MATRIX_ROUNDS, RunFigures, SiteInRun
from server.report.formatting import format_bytes, format_number, format_seconds
from server.runs.history import spent_text
from server.runs.run_directory import RunDir
from shared.pages.parts import Part, cell, chart, facts, lines, pictures, table
from shared.storage.runlog import OUTCOMES

TABLE_ROUNDS = 25
SYMBOLS = {"answered": "✓", "refused": "–", "failed": "!", "late": "…", "lost": "×", "rejected": "≠"}
"""As on the report."""
RUNNING = {"asked": "works on it", "requeued": "lost, will be asked again", "offline": "offline"}


def run_parts(name: str, figures: RunFigures, path: Path, rounds_planned: int) -> Iterator[Part]:
    """Everything of one run; what it does now comes first."""
    key, run = f"run-{name}", RunDir(path)
    yield _now(key, name, figures, run, rounds_planned)
    progress = read_progress(run)
    if progress.get("sites"):
        yield _running_round(key, name, progress)
    if figures.offers and not figures.rounds:
        yield _offers(key, name, figures)
    yield from filter(None, _curves(key, name, figures))
    if figures.rounds:
        yield _rounds(key, name, figures)
        yield _matrix(key, name, figures)
    if grids := grids_of(run):
        named = [(picture_name(name, number), f"round {number}") for number in dict.fromkeys((grids[0], grids[-1]))]
        yield pictures(f"{key}-pictures", f"{name}: the same seeds", named)
    told = [(text, "none") for text in reversed(figures.problems)]
    yield lines(f"{key}-problems", f"{name}: what went otherwise", told, empty="nothing so far")


def read_progress(run: RunDir) -> dict[str, Any]:
    """What a run does now, from `progress.json`; empty where it says nothing."""
    try:
        found = json.loads(run.progress.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def grids_of(run: RunDir) -> list[int]:
    """Rounds whose sample grids lie in the run, in order."""
    stems = (file.stem.partition("-") for file in run.samples.glob("round-*.png"))
    return sorted(int(number) for _, _, number in stems if number.isdecimal())


def picture_name(run: str, server_round: int) -> str:
    """What the page asks for a grid by."""
    return f"{run}.{server_round}"


def when(seconds: float | None) -> str:
    """A moment of Unix time in UTC; a dash where there is none."""
    if not seconds:
        return "–"
    return f"{dt.datetime.fromtimestamp(seconds, dt.UTC):%Y-%m-%d %H:%M:%S} UTC"


def spent_cell(site: SiteInRun | None) -> Any:  # noqa: ANN401  # a cell
    """Epsilon of a site against its cap, with a bar of the part with DP."""
    if site is None or not site.spent:
        return "–"
    spent = site.spent
    value, cap = spent.get("dp_epsilon", spent["epsilon"]), spent.get("epsilon_cap")
    text = (
        f"{spent_text(spent)} of {format_number(cap)} per {spent.get('unit') or 'unit'}" if cap else spent_text(spent)
    )
    share = value / cap if cap and isinstance(value, int | float) else None
    return cell(text, share=share)


def _now(key: str, name: str, figures: RunFigures, run: RunDir, planned: int) -> Part:
    progress, done = read_progress(run), max(figures.rounds, default=0)
    rows: list[tuple[str, object]] = [("rounds done", f"{done} of {planned}")]
    if figures.status == "running" and progress:
        rows.append(("now", f"round {progress.get('round')}: {progress.get('stage')}"))
        rows.append(("newest change", when(progress.get("since"))))
        if isinstance(progress.get("evaluating"), int):
            rows.append(("evaluation running", f"round {progress['evaluating']}"))
    else:
        rows.append(("now", figures.status or "not started"))
    for metric, values in sorted(figures.distances.items()):
        first, last = min(values), max(values)
        rows.append(
            (metric, f"{format_number(values[first])} at round {first}, {format_number(values[last])} at {last}")
        )
    if figures.resubmissions:
        rows.append(("submitted again", f"{figures.resubmissions} times"))
    if text := figures.progress_text:
        rows.append(("log", text))
    return facts(f"{key}-now", f"Run {name}", rows)


def _running_round(key: str, name: str, progress: dict[str, Any]) -> Part:
    answers = progress.get("answers", {})
    rows = []
    for site, state in sorted(progress["sites"].items()):
        answer = answers.get(site, {})
        came = [format_seconds(answer["seconds"]), format_bytes(answer["bytes"])] if answer else ["–", "–"]
        rows.append([site, cell(RUNNING.get(state, state), state if state in OUTCOMES else ""), *came])
    heading = f"{name}: round {progress.get('round')}, {progress.get('stage')}"
    return table(f"{key}-running", heading, ["site", "state", "seconds", "bytes"], rows, text_columns=["state"])


def _offers(key: str, name: str, figures: RunFigures) -> Part:
    rows = []
    for site, offer in sorted(figures.offers.items()):
        costs = (format_number(offer[each]) for each in ("epsilon_round", "epsilon_run", "epsilon_cap"))
        state = "answered" if offer["status"] == "accepted" else "refused"
        rows.append([site, cell(offer["status"], state), offer["unit"] or "–", *costs, offer["reason"] or ""])
    columns = ["site", "answer", "unit", "epsilon after a round", "after all", "cap", "why not"]
    return table(f"{key}-offers", f"{name}: offers", columns, rows, text_columns=["answer", "why not"])


def _curves(key: str, name: str, figures: RunFigures) -> Iterator[Part | None]:
    for number, (metric, values) in enumerate(sorted(figures.distances.items())):
        places = sorted(values)
        ys = [values[place] for place in places]
        yield chart(
            f"{key}-distance-{number}", f"{name}: {metric}", "round", [(metric, places, ys)], note="lower is better"
        )
    rounds = [figures.rounds[number] for number in sorted(figures.rounds)]
    xs = [each.number for each in rounds]
    yield chart(f"{key}-loss", f"{name}: loss at the sites", "round", [("loss", xs, [each.loss for each in rounds])])
    nearest = sorted(figures.sites.items(), key=lambda item: -max(item[1].curve.values(), default=0.0))
    curves = [
        (site, sorted(each.curve), [each.curve[x] for x in sorted(each.curve)])
        for site, each in nearest[:6]
        if each.curve
    ]
    caps = {float(cap) for _, each in nearest[:6] if each.curve and (cap := each.spent.get("epsilon_cap"))}
    more = f"the {len(curves)} sites that have spent most, of {len(nearest)}" if len(nearest) > len(curves) else ""
    limits = [(f"cap {format_number(cap)}", cap) for cap in sorted(caps)] if len(caps) == 1 else []
    yield chart(f"{key}-epsilon", f"{name}: epsilon spent, with DP", "round", curves, limits=limits, note=more)
    yield chart(
        f"{key}-update",
        f"{name}: size of the update",
        "round",
        [("L2 norm", xs, [each.update_norm for each in rounds])],
    )
    yield chart(
        f"{key}-seconds", f"{name}: seconds of a round", "round", [("seconds", xs, [each.seconds for each in rounds])]
    )


def _rounds(key: str, name: str, figures: RunFigures) -> Part:
    rows = []
    for number in sorted(figures.rounds, reverse=True)[:TABLE_ROUNDS]:
        each = figures.rounds[number]
        sites = ", ".join(f"{n} {state}" for n, state in zip(each.outcomes, OUTCOMES, strict=True) if n)
        changed = format_number(each.update_norm) if each.is_changed else cell(f"unchanged: {each.reason}", "late")
        figures_of = (format_number(each.loss), changed, format_bytes(each.bytes), format_seconds(each.seconds))
        rows.append([str(number), sites, *figures_of, format_number(each.epsilon)])
    older = len(figures.rounds) - len(rows)
    note = f"the newest {TABLE_ROUNDS}; {older} older ones: `maskfed-server report`" if older else ""
    columns = ["round", "sites", "loss", "update", "bytes", "seconds", "largest epsilon"]
    return table(f"{key}-rounds", f"{name}: rounds", columns, rows, note=note, text_columns=["sites"])


def _matrix(key: str, name: str, figures: RunFigures) -> Part:
    numbers, rows = sorted(figures.matrix), []
    for site in sorted(figures.sites):
        states = (figures.matrix[number].get(site, ("", ""))[0] for number in numbers)
        rows.append([site, *(cell(SYMBOLS.get(state, ""), state or "none") for state in states)])
    legend = ", ".join(f"{symbol} {state}" for state, symbol in SYMBOLS.items())
    heading = f"{name}: who took part in the newest {min(len(numbers), MATRIX_ROUNDS)} rounds"
    return table(f"{key}-matrix", heading, ["site", *map(str, numbers)], rows, note=f"{legend}; empty: not asked")
