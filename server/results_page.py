"""`server/RESULTS.md` and its plots, written from stored results alone: no number in it is typed by hand."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server import results
from server.charts import Series, line_chart, standalone
from server.derived import Derived, chosen_point, derive, test_curve, test_distance
from server.report import format_number, format_seconds
from server.results import ArmResult, read_results
from server.studies import SCALES, Grid, Scale, Study, arms_at, load_study, study_names
from shared.errors import InputError
from shared.files import write_atomically
from shared.sections import Section

PAGE_NAME, REPORTED_FILE = "RESULTS.md", "reported.toml"
HEADER = """# Results

Written by `maskfed-server report --results` from the files in [results](results); do not edit by hand. Studies are data
files in [experiments/reproduce](experiments/reproduce); an arm runs with `maskfed-server reproduce STUDY --scale SCALE
--arm ARM`.

How to read it: distances are Frechet distances between features of generated images and of the test split
(`fd_onnx:NAME`: the features of an ONNX network; only the Inception-2015 weights give an FID), lower is closer;
"kernel" is the kernel distance (KID where the distance is an FID). Splits never share a person. What is reported of an
arm is its point of least distance to the validation split by the first extractor; the test split decides nothing. One
seed: differences of a few percent are noise.
"""
Results = Mapping[tuple[str, str, str], ArmResult]


class ReportedTable(Section):
    """Rows that somebody else reports."""

    title: str
    source: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


class Reported(Section):
    """All of them."""

    tables: tuple[ReportedTable, ...]


@dataclass(frozen=True)
class Pages:
    """Texts of the page and of its plots, by path."""

    texts: dict[Path, str]

    def write(self) -> None:
        """Write all; plots that no result gives any more go."""
        for path, text in self.texts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, text)
        for path in self._left_over():
            path.unlink()

    def stale(self) -> list[Path]:
        """Files that are missing, differ from what the results give, or should not be there."""
        wrong = [
            path for path, text in self.texts.items() if not path.is_file() or path.read_text(encoding="utf-8") != text
        ]
        return [*wrong, *self._left_over()]

    def _left_over(self) -> list[Path]:
        folders = {path.parent for path in self.texts if path.suffix == ".svg"}
        found = {plot for folder in folders for plot in folder.glob("*.svg")}
        return sorted(found - set(self.texts))


def make_pages(folder: Path = results.FOLDER) -> Pages:
    """The page beside a folder of results, and its plots in the folder.

    Raises:
        InputError: a damaged result, or one of a study or arm that there is not.
    """
    stored = read_results(folder)
    studies = {name: load_study(name) for name in study_names()}
    for named, _, arm in stored:
        if named not in studies or arm not in studies[named].arms:
            raise InputError(f"result of {named}, arm {arm}: there is no such arm: remove the file")
    texts: dict[Path, str] = {}
    parts = [HEADER]
    for name, study in studies.items():
        parts.append(f"## {study.title}\n\n{study.question.strip()}\n")
        for scale in SCALES:
            if scale in study.scales:
                parts += _at_scale(study, name, scale, stored, folder, texts)
        if study.discussion:
            parts.append(study.discussion.strip() + "\n")
    parts += _reported(folder / REPORTED_FILE)
    parts.append("## Where the numbers come from\n\n" + _provenance(stored))
    texts[folder.parent / PAGE_NAME] = "\n".join(parts)
    return Pages(texts)


def _at_scale(
    study: Study, name: str, scale: Scale, stored: Results, folder: Path, texts: dict[Path, str]
) -> list[str]:
    names = arms_at(study, name, scale)
    done = [arm for arm in names if (name, scale, arm) in stored]
    parts = [f"### {study.title}, scale `{scale}`\n"]
    if done:
        parts.append(_setting(stored[name, scale, done[-1]]))
        parts.append(_arms_table(study, [(arm, stored[name, scale, arm]) for arm in done]))
        for distance, svg in _charts(study, [(arm, stored[name, scale, arm]) for arm in done]):
            file = folder / f"{name}-{scale}-{_file_name(distance)}.svg"
            texts[file] = svg
            parts.append(f"![{distance} against images]({folder.name}/{file.name})\n")
        parts += [_grid(study, name, scale, grid, stored) for grid in study.grids]
        if derived := derive(study, name, stored, scale):
            parts.append("\n".join(f"- {_sentence(study, each)}." for each in derived) + "\n")
            parts.append(_reading(study, derived))
    if missing := [arm for arm in names if arm not in done]:
        what = "No arm has run" if not done else f"Not run: {', '.join(missing)}"
        parts.append(f"{what} (`maskfed-server reproduce {name} --scale {scale}`).\n")
    return parts


def _setting(result: ArmResult) -> str:
    model, test = result.experiment["model"], result.data.get("test", {})
    text = f"Model {model['size']} at {model['image_size']} px, patch {model['patch_size']}"
    if test:
        text += (
            f"; {result.measured['num_images']:,} images by {result.measured['nfe']} evaluations of "
            f"{result.measured['sampler']} against {test['images']:,} test images of {test['set']}"
        )
    return text + ".\n"


def _arms_table(study: Study, arms: Sequence[tuple[str, ArmResult]]) -> str:
    distances = list(dict.fromkeys(distance for _, result in arms for distance in result.extractors))
    head = ["arm", "trained on", "steps", "images", "PFLOP with all stages", "reported at"]
    for distance in distances:
        head += [f"{distance}: distance", "kernel", "precision", "recall"]
    rows = []
    for arm, result in arms:
        train, point = result.data["train"], chosen_point(result)
        row = [
            f"{arm}: {study.arms[arm].title}",
            f"{train['images']:,} images of {train['persons']:,} persons, {train['set']}",
            f"{result.last.steps:,}",
            f"{result.last.images:,}",
            format_number(result.total_flops / 1e15),
            f"{point.images:,}" if result.extractors else "-",
        ]
        for distance in distances:
            found = point.metrics.get("test", {}).get(distance, {})
            row += [format_number(found.get(key)) for key in ("distance", "kernel", "precision", "recall")]
        rows.append(row)
    return _table(head, rows)


def _charts(study: Study, arms: Sequence[tuple[str, ArmResult]]) -> list[tuple[str, str]]:
    """(distance, SVG) by extractor."""
    found = []
    for distance in dict.fromkeys(distance for _, result in arms for distance in result.extractors):
        series = [
            Series(arm, [float(images) for images, _ in curve], [value for _, value in curve])
            for arm, result in arms
            if distance in result.extractors
            for curve in [test_curve(result, distance)]
        ]
        label = f"{distance} to the test split"
        svg = line_chart(series, "images seen in this stage", label, log_x=True, log_y=True)
        found.append((distance, standalone(svg) + "\n"))
    return found


def _sentence(study: Study, derived: Derived) -> str:
    """One figure in words; the words come from the numbers, too."""
    arm, baseline = (study.arms[name].title for name in (derived.figure.arm, derived.figure.baseline))
    match derived.figure.kind:
        case "speedup":
            assert derived.level is not None
            assert derived.flop_value is not None
            at_least, at_most = ("at least ", "at most ") if derived.is_bound else ("", "")
            text = (
                f"`{derived.distance}`: {arm} reaches {format_number(derived.level)} after "
                f"{at_most}{_count(derived.arm_value)} images, {baseline} after {_count(derived.baseline_value)}: "
                f"**{at_least}{_times(derived.value)} images**, and {_times(derived.flop_value)} operations with all "
                "stages counted in"
            )
        case "reduction":
            change = "lower" if derived.value >= 0 else "HIGHER"
            text = f"`{derived.distance}`: {arm}: **{abs(derived.value):.0%} {change}** than {baseline}{_pair(derived)}"
        case "ratio":
            text = f"`{derived.distance}`: {arm} over {baseline}: **{derived.value:.3f}**{_pair(derived)}"
    if derived.goal is not None:
        text += f"; goal {derived.goal:g}: {'reached' if derived.is_reached else f'MISSED by {_gap(derived):.3g}'}"
    return text


def _reading(study: Study, derived: Sequence[Derived]) -> str:
    """Which figures go the way that the paper found, and which do not."""
    against = [each for each in derived if not each.is_as_claimed]
    text = f"{len(derived) - len(against)} of {len(derived)} figures go the way the paper reports or the goal asks."
    if against:
        named = dict.fromkeys(f"{study.arms[each.figure.arm].title} by `{each.distance}`" for each in against)
        text += f" Against it: {'; '.join(named)}."
    return text + "\n"


def _grid(study: Study, name: str, scale: Scale, grid: Grid, stored: Results) -> str:
    """Distances of several arms side by side, with the change against the first column."""
    first = next((result for result in stored.values() if result.study == name and result.extractors), None)
    lines = []
    for distance in first.extractors if first else {}:
        for label, arms in grid.rows.items():
            values = [
                test_distance(chosen_point(stored[name, scale, arm]), distance)
                if (name, scale, arm) in stored
                else None
                for arm in arms
            ]
            changes = [f" ({value / values[0] - 1:+.0%})" if value and values[0] else "" for value in values]
            cells = [
                f"{format_number(value)}{change}" for value, change in zip(values, ["", *changes[1:]], strict=True)
            ]
            lines.append([label, *cells, f"`{distance}`"])
    return f"{grid.title}:\n\n{_table([grid.label, *grid.columns, 'distance'], lines)}"


def _pair(derived: Derived) -> str:
    return f" ({format_number(derived.arm_value)} against {format_number(derived.baseline_value)})"


def _times(factor: float) -> str:
    return f"{factor:.2f} times fewer" if factor >= 1 else f"{1 / factor:.2f} times MORE"


def _gap(derived: Derived) -> float:
    assert derived.goal is not None
    return abs(derived.value - derived.goal)


def _count(images: float) -> str:
    return f"{round(images, -2):,.0f}" if images >= 1000 else f"{images:.0f}"


def _reported(path: Path) -> list[str]:
    """The paper's own rows, marked as such.

    Raises:
        InputError: the file is not what it should be.
    """
    try:
        tables = Reported.model_validate(tomllib.loads(path.read_text(encoding="utf-8"))).tables
    except (OSError, ValueError) as error:
        raise InputError(f"{path.name}: not a file of reported rows ({error}): restore it") from error
    parts = ["## Reported by the paper, not measured here\n"]
    for table in tables:
        rows = [[*row, "reported by the paper"] for row in table.rows]
        parts.append(f"{table.title} ({table.source}).\n\n{_table([*table.columns, 'origin'], rows)}")
    return parts


def _provenance(stored: Results) -> str:
    if not stored:
        return "No arm has run yet.\n"
    head = ["command", "commit", "hardware, threads", "date", "training", "measuring", "generated", "seed"]
    rows = [
        [
            f"`{result.command}`",
            _commit(result.commit),
            f"{result.hardware}, {result.threads}",
            result.date,
            format_seconds(result.training_seconds),
            format_seconds(result.measuring_seconds) if result.extractors else "-",
            str(result.measured.get("num_images", "-")),
            str(result.experiment["train"]["seed"]),
        ]
        for result in stored.values()
    ]
    return _table(head, rows)


def _commit(commit: str | None) -> str:
    if not commit:
        return "-"
    digits, plus, rest = commit.partition("+")
    return f"{digits[:10]}{plus}{rest}"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) + "\n"


def _file_name(distance: str) -> str:
    return distance.replace(":", "-").replace("/", "-")
