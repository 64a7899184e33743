"""RESULTS.md as text: what its template is given, and how its numbers are written."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from server.report.formatting import format_number, format_seconds
from server.studies.page.break_even import BreakEven, count
from server.studies.page.derived import Derived, chosen_point, distance_to_test
from server.studies.page.seed_spread import SeedSpread
from server.studies.page.toy_table import ToyTable
from server.studies.schema import Arm, ArmGrid, Scale
from server.studies.stored_results import ArmResult
from shared.errors import InputError
from shared.experiment.base import Section
from shared.messages.audit import PIXELS

Results = Mapping[tuple[str, str, str], ArmResult]
Arms = Sequence[tuple[str, ArmResult]]


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
class GridCell:
    """The distance of one arm, with its change against the first column and its share of copies."""

    distance: float | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class GridRow:
    """Arms side by side, by one distance."""

    distance: str
    label: str
    cells: list[GridCell]


@dataclass(frozen=True)
class ScaleSection:
    """The arms of a study at one scale, on real or on synthetic faces; files are given as the page links them."""

    title: str
    command: str
    arms: Arms
    missing: Sequence[str] = ()
    plots: Sequence[tuple[str, str]] = ()
    """(distance, file)."""
    pictures: Sequence[tuple[str, ArmResult, str]] = ()
    grids: Sequence[tuple[ArmGrid, list[GridRow]]] = ()
    derived: Sequence[Derived] = ()
    compared: Sequence[BreakEven] = ()
    spread: SeedSpread = field(default_factory=SeedSpread)

    @property
    def measured(self) -> Arms:
        """Arms that distances were measured of."""
        return [(arm, result) for arm, result in self.arms if result.extractors]

    @property
    def ended(self) -> Arms:
        """Arms whose end was measured once more, with many images."""
        return [(arm, result) for arm, result in self.arms if result.end]

    @property
    def distances(self) -> list[str]:
        """Names of all distances."""
        return distances_of(self.arms)


@dataclass(frozen=True)
class StudyText:
    """A study as the page shows it."""

    title: str
    question: str
    arms: Mapping[str, Arm]
    discussion: str
    blocks: Sequence[ScaleSection]


def render(
    studies: Sequence[StudyText],
    toys: Sequence[ToyTable],
    reported: Sequence[ReportedTable],
    results: Sequence[ArmResult],
) -> str:
    """The page."""
    environment = Environment(
        loader=PackageLoader("server.studies.page", "templates"),
        autoescape=False,  # Markdown
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "number": format_number,
        "tera": lambda value: format_number(value / 1e12),
        "count": count,
        "share": _share,
        "change": _change,
        "times": _times,
        "seconds": format_seconds,
        "commit": _commit,
        "chosen_point": chosen_point,
    }
    return environment.get_template("results.md").render(studies=studies, toys=toys, reported=reported, results=results)


def distances_of(arms: Arms) -> list[str]:
    """Names of the distances of several arms, each once."""
    return list(dict.fromkeys(distance for _, result in arms for distance in result.extractors))


def grid_rows(name: str, scale: Scale, grid: ArmGrid, stored: Results) -> list[GridRow]:
    """Distances of several arms side by side, by every distance; none where no arm has run."""
    asked = [arm for row in grid.rows.values() for arm in row]
    measured = {arm: stored[name, scale, arm] for arm in asked if (name, scale, arm) in stored}
    return [
        GridRow(distance, label, _cells([measured.get(arm) for arm in arms], distance))
        for distance in distances_of(list(measured.items()))
        for label, arms in grid.rows.items()
    ]


def _cells(arms: Sequence[ArmResult | None], distance: str) -> list[GridCell]:
    values = [distance_to_test(chosen_point(arm), distance) if arm else None for arm in arms]
    cells = []
    for column, (arm, value) in enumerate(zip(arms, values, strict=True)):
        copied = chosen_point(arm).copied.get(PIXELS) if arm else None
        change = f"{value / values[0] - 1:+.0%}" if column and value and values[0] else ""
        notes = (change, "" if copied is None else f"{copied:.0%} copied")
        cells.append(GridCell(value, tuple(note for note in notes if note)))
    return cells


def read_reported(path: Path) -> tuple[ReportedTable, ...]:
    """The paper's own rows.

    Raises:
        InputError: the file is not what it should be.
    """
    try:
        return Reported.model_validate(tomllib.loads(path.read_text(encoding="utf-8"))).tables
    except (OSError, ValueError) as error:
        raise InputError(f"{path.name}: not a file of reported rows ({error}): restore it") from error


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _change(reduction: float) -> str:
    return f"{abs(reduction):.0%} {'lower' if reduction >= 0 else 'higher'}"


def _times(factor: float) -> str:
    return f"{factor:.2f} times fewer" if factor >= 1 else f"{1 / factor:.2f} times more"


def _commit(commit: str | None) -> str:
    digits, plus, rest = (commit or "-").partition("+")
    return f"{digits[:10]}{plus}{rest}"
