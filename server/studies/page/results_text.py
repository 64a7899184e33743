"""The words and tables of RESULTS.md, all of them from stored results; which words are used depends on the numbers."""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

from server.report.formatting import format_number, format_seconds
from server.studies.page.derived import Derived, chosen_point, distance_to_test
from server.studies.schema import ArmGrid, Scale, Study
from server.studies.stored_results import ArmResult
from shared.errors import InputError
from shared.experiment.sections import Section
from shared.messages.audit import PIXELS

Results = Mapping[tuple[str, str, str], ArmResult]
_METRICS = ("distance", "kernel", "precision", "recall")


class ReportedTable(Section):
    """Rows that somebody else reports."""

    title: str
    source: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


class Reported(Section):
    """All of them."""

    tables: tuple[ReportedTable, ...]


def setting(result: ArmResult) -> str:
    """Model and measurement, in a line."""
    model, test = result.experiment["model"], result.data.get("test", {})
    text = f"Model {model['size']} at {model['image_size']} px, patch {model['patch_size']}"
    if test:
        text += (
            f"; {result.measured['num_images']:,} images by {result.measured['nfe']} evaluations of "
            f"{result.measured['sampler']} against {test['images']:,} test images of {test['set']}"
        )
    return text + ".\n"


def arms_table(study: Study, arms: Sequence[tuple[str, ArmResult]]) -> str:
    """What each arm trained."""
    head = ["arm", "what", "starts from", "trained on", "steps", "images seen", "TFLOP with all stages"]
    rows = []
    for arm, result in arms:
        train = result.data["train"]
        rows.append(
            [
                arm,
                study.arms[arm].title,
                result.init.arm if result.init else "random",
                f"{train['images']:,} of {train['persons']:,} persons, {train['set']}",
                f"{result.last.steps:,}",
                f"{result.last.images:,}",
                format_number(result.total_flops / 1e12),
            ]
        )
    return table(head, rows)


def distances_table(arms: Sequence[tuple[str, ArmResult]]) -> str:
    """What each arm came to, at the point that validation chose; copies, and what copying everything would get."""
    rows = []
    for distance in _distances(arms):
        for arm, result in arms:
            if distance in result.extractors:
                point = chosen_point(result)
                found = point.metrics["test"][distance]
                values = [format_number(found.get(key)) for key in _METRICS]
                own = result.training_images.get("test", {}).get(distance, {}).get("distance")
                shares = [_share(point.copied.get(name)) for name in (PIXELS, distance)]
                rows.append([f"`{distance}`", arm, f"{point.images:,}", *values, *shares, format_number(own)])
    copied = ["copied, by pixels", "by features"]
    head = ["extractor", "arm", "reported at images", *_METRICS, *copied, "training images themselves"]
    return table(head, rows)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def curves_table(arms: Sequence[tuple[str, ArmResult]]) -> str:
    """Every measured point, folded away."""
    distances = _distances(arms)
    rows = [
        [arm, f"{point.images:,}", format_number((point.flops + (result.init.flops if result.init else 0.0)) / 1e12)]
        + [format_number(point.metrics["test"].get(distance, {}).get("distance")) for distance in distances]
        + [_share(point.copied.get(PIXELS))]
        for arm, result in arms
        for point in result.curve
        if point.metrics
    ]
    head = ["arm", "images seen", "TFLOP with all stages", *(f"`{distance}`" for distance in distances)]
    head.append("copied, by pixels")
    title = "All measured points: distance to the test split"
    return f"<details><summary>{title}</summary>\n\n{table(head, rows)}\n</details>\n"


def _distances(arms: Sequence[tuple[str, ArmResult]]) -> list[str]:
    return list(dict.fromkeys(distance for _, result in arms for distance in result.extractors))


def sentence(study: Study, derived: Derived) -> str:
    """One figure in words; the words come from the numbers, too."""
    arm, baseline = (study.arms[name].title for name in (derived.figure.arm, derived.figure.baseline))
    match derived.figure.kind:
        case "speedup":
            assert derived.level is not None
            assert derived.flop_value is not None
            first, bound = " (its first point)", f"{derived.bound} " if derived.bound else ""
            ours = first if derived.bound == "at least" else ""
            theirs = first if derived.bound == "at most" else ""
            text = (
                f"`{derived.distance}`: {arm} reaches {format_number(derived.level)} after "
                f"{count(derived.arm_value)} images{ours}, {baseline} after {count(derived.baseline_value)}{theirs}: "
                f"**{bound}{_times(derived.value)} images**, and {bound}{_times(derived.flop_value)} operations "
                "with all stages counted in"
            )
        case "reduction":
            text = f"`{derived.distance}`: {arm}: **{_change(derived.value)}** than {baseline}{_pair(derived)}"
            if derived.equal_flops_value is not None:
                text += f", {_change(derived.equal_flops_value)} at equal operations, all stages counted in"
        case "ratio":
            text = f"`{derived.distance}`: {arm} over {baseline}: **{derived.value:.3f}**{_pair(derived)}"
    if derived.goal is not None:
        text += f"; goal {derived.goal:g}: {'reached' if derived.is_reached else f'MISSED by {_gap(derived):.3g}'}"
    return text


def reading(study: Study, derived: Sequence[Derived]) -> str:
    """Which figures go the way that the paper found, and which do not."""
    against = [each for each in derived if not each.is_as_claimed]
    text = f"{len(derived) - len(against)} of {len(derived)} figures go the way the paper reports or the goal asks."
    if against:
        named = dict.fromkeys(f"{study.arms[each.figure.arm].title} by `{each.distance}`" for each in against)
        text += f" Against it: {'; '.join(named)}."
    return text + "\n"


def grid_table(name: str, scale: Scale, grid: ArmGrid, stored: Results) -> str:
    """Distances of several arms side by side, with the change against the first column."""
    asked = [arm for row in grid.rows.values() for arm in row]
    measured = {arm: stored[name, scale, arm] for arm in asked if (name, scale, arm) in stored}
    lines = []
    for distance in _distances(list(measured.items())):
        for label, arms in grid.rows.items():
            values = [
                distance_to_test(chosen_point(measured[arm]), distance) if arm in measured else None for arm in arms
            ]
            changes = [f"{value / values[0] - 1:+.0%}" if value and values[0] else "" for value in values]
            copied = [chosen_point(measured[arm]).copied.get(PIXELS) if arm in measured else None for arm in arms]
            lines.append([f"`{distance}`", label, *map(_cell, values, ["", *changes[1:]], copied)])
    return f"{grid.title}:\n\n{table(['extractor', grid.label, *grid.columns], lines)}" if lines else ""


def _cell(value: float | None, change: str, copied: float | None) -> str:
    notes = [note for note in (change, "" if copied is None else f"{copied:.0%} copied") if note]
    return format_number(value) + (f" ({', '.join(notes)})" if notes else "")


def _pair(derived: Derived) -> str:
    return f" ({format_number(derived.arm_value)} against {format_number(derived.baseline_value)})"


def _change(reduction: float) -> str:
    return f"{abs(reduction):.0%} {'lower' if reduction >= 0 else 'HIGHER'}"


def _times(factor: float) -> str:
    return f"{factor:.2f} times fewer" if factor >= 1 else f"{1 / factor:.2f} times MORE"


def _gap(derived: Derived) -> float:
    assert derived.goal is not None
    return abs(derived.value - derived.goal)


def count(images: float) -> str:
    """A number of images, rounded to hundreds."""
    return f"{round(images, -2):,.0f}" if images >= 1000 else f"{images:.0f}"


def reported(path: Path) -> list[str]:
    """The paper's own rows, marked as such.

    Raises:
        InputError: the file is not what it should be.
    """
    try:
        tables = Reported.model_validate(tomllib.loads(path.read_text(encoding="utf-8"))).tables
    except (OSError, ValueError) as error:
        raise InputError(f"{path.name}: not a file of reported rows ({error}): restore it") from error
    parts = ["## Reported by the paper, not measured here\n"]
    for each in tables:
        rows = [[*row, "reported by the paper"] for row in each.rows]
        parts.append(f"{each.title} ({each.source}).\n\n{table([*each.columns, 'origin'], rows)}")
    return parts


def picture_caption(study: Study, arm: str, result: ArmResult) -> str:
    """What the rows of an arm's picture are."""
    counts = ", ".join(f"{point.images:,}" for point in result.curve)
    return f"{study.arms[arm].title}, from top to bottom after {counts} images; one column, one noise:"


def provenance(stored: Sequence[ArmResult]) -> str:
    """Command, commit, hardware and date of each result."""
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
        for result in stored
    ]
    return table(head, rows)


def _commit(commit: str | None) -> str:
    if not commit:
        return "-"
    digits, plus, rest = commit.partition("+")
    return f"{digits[:10]}{plus}{rest}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) + "\n"
