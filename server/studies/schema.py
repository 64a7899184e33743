"""Studies: a question, the arms that answer it, and what is derived from them; one data file each. No torch here."""

import tomllib
from pathlib import Path
from typing import Literal, Self, cast

from pydantic import Field, ValidationError, model_validator

from shared.errors import InputError
from shared.experiment.base import Section
from shared.experiment.config import explain

FOLDER = Path(__file__).parent / "definitions"
SCALES = ("cpu", "gpu", "paper")
Scale = Literal["cpu", "gpu", "paper"]
Source = Literal["public", "private"]


class ImagePart(Section):
    """A part of one of the two image sets; no person is in two parts of a set."""

    source: Source
    share: float = Field(gt=0, le=1)
    """Of the persons; images without persons count as a person each."""


class Stage(Section):
    """What one arm trains at one scale."""

    recipe: str
    """Name of an experiment that ships with the project."""
    settings: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """`"section.key" = value`, replaces settings of the recipe."""
    images: int = Field(0, ge=0)
    """Images seen in all, over all sites; 0: steps and batch of the recipe."""
    at: tuple[int, ...] = ()
    """Images seen at which the distance is measured; it always is at the end."""
    init: str = ""
    """Start of this scale, where it is another than the arm's."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if "train.seed" in self.settings:
            raise ValueError("settings: train.seed is what `reproduce --seed` gives: leave it out")
        if list(self.at) != sorted(set(self.at)):
            raise ValueError(f"at {list(self.at)} is not rising: sort it, each number once")
        if self.images and self.at and self.at[-1] > self.images:
            raise ValueError(f"at {self.at[-1]} is above images {self.images}: leave it out")
        return self


class Arm(Section):
    """One training and its measurements."""

    title: str
    split: str
    """Images that are trained on ..."""
    share: float = Field(1.0, gt=0, le=1)
    """... or this share of them, whole persons."""
    init: str = ""
    """Arm whose average weights it starts from, `arm` or `study/arm`; empty: random."""
    sites: int = Field(0, ge=0)
    """Sites of a federated fine-tuning, divided by person; 0: one central training."""
    test: str = ""
    """Split that distances are reported against; empty: not measured."""
    validation: str = ""
    """Split by which the reported point is chosen."""
    scales: dict[Scale, Stage]

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if bool(self.test) != bool(self.validation):
            raise ValueError("give both test and validation, or neither")
        if self.sites and not self.init:
            raise ValueError(f"sites {self.sites} need init: a federation starts from a checkpoint")
        if not self.scales:
            raise ValueError("no scale: give at least one")
        return self


class Figure(Section):
    """A number derived from two arms."""

    kind: Literal["speedup", "reduction", "ratio"]
    """`speedup`: images of the baseline over images of the arm at equal distance, and the same in operations;
    `reduction`: 1 - distance over distance of the baseline; `ratio`: distance over distance of the baseline."""
    arm: str
    baseline: str
    goal: dict[Scale, float] = Field(default_factory=dict)
    """Least speed-up or reduction, largest ratio."""


class ArmGrid(Section):
    """Distances of several arms side by side, as in a table of the paper."""

    title: str
    label: str
    """Of the first column, which names the rows."""
    columns: tuple[str, ...]
    rows: dict[str, tuple[str, ...]]
    """Arms of each row, one for each column; changes are against the first."""


class ScalePlan(Section):
    """What all arms of a study share at one scale."""

    generated: int = Field(ge=2)
    """Images generated for each distance."""
    synthetic: int = Field(ge=1)
    """Images of each of the two sets where synthetic faces stand in."""


class Study(Section):
    """One question."""

    title: str
    question: str
    discussion: str = ""
    """By hand: what the figures mean and do not mean."""
    seed: int = Field(0, ge=0)
    """Of the division into splits."""
    splits: dict[str, ImagePart]
    scales: dict[Scale, ScalePlan]
    arms: dict[str, Arm]
    figures: tuple[Figure, ...] = ()
    grids: tuple[ArmGrid, ...] = ()

    @model_validator(mode="after")
    def _splits_fit(self) -> Self:
        for source in ("public", "private"):
            total = sum(split.share for split in self.splits.values() if split.source == source)
            if total > 1 + 1e-9:
                raise ValueError(f"splits of {source} add up to {total:g}: at most 1")
        return self

    @model_validator(mode="after")
    def _arms_refer_to_what_is_there(self) -> Self:
        for name, arm in self.arms.items():
            for split in filter(None, (arm.split, arm.test, arm.validation)):
                if split not in self.splits:
                    raise ValueError(f"arms.{name}: split {split!r} is unknown, known are {', '.join(self.splits)}")
            for init in (arm.init, *(stage.init for stage in arm.scales.values())):
                if init and "/" not in init and init not in self.arms:
                    raise ValueError(f"arms.{name}: init {init!r} is no arm of this study")
            if unknown := set(arm.scales) - set(self.scales):
                raise ValueError(f"arms.{name}: scale {min(unknown)!r} is not among the study's scales")
        return self

    @model_validator(mode="after")
    def _figures_refer_to_measured_arms(self) -> Self:
        for grid in self.grids:
            if any(len(row) != len(grid.columns) for row in grid.rows.values()):
                raise ValueError(f"grids: {grid.title!r}: give one arm for each of the {len(grid.columns)} columns")
        in_figures = [name for figure in self.figures for name in (figure.arm, figure.baseline)]
        in_grids = [name for grid in self.grids for row in grid.rows.values() for name in row]
        for name in (*in_figures, *in_grids):
            if name not in self.arms or not self.arms[name].test:
                raise ValueError(f"figures and grids: {name!r} is no measured arm of this study")
        return self


def study_names() -> list[str]:
    """Names of all studies, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_study(name: str) -> Study:
    """The study of a name, or of a file.

    Raises:
        InputError: no such study, bad TOML, unknown key, or a reference to nothing; the line names the key.
    """
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"study {name!r} is unknown: known are {', '.join(study_names())}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"study {path.name}: not valid TOML ({error})") from error
    try:
        return Study.model_validate(tree)
    except ValidationError as error:
        raise InputError(f"study {path.name}: {explain(error, Study)}") from error


def arm_at(study: Study, study_name: str, arm: str, scale: str) -> tuple[Arm, Stage, Scale]:
    """An arm, and what it trains at a scale.

    Raises:
        InputError: no such arm, or not at that scale; the line lists what there is.
    """
    if scale not in SCALES:
        raise InputError(f"scale {scale!r} is unknown: give one of {', '.join(SCALES)}")
    known = cast(Scale, scale)
    if arm not in study.arms:
        raise InputError(f"study {study_name} has no arm {arm!r}: it has {', '.join(study.arms)}")
    chosen = study.arms[arm]
    if known not in chosen.scales:
        raise InputError(
            f"arm {arm} of {study_name} has no scale {scale!r}: it has {', '.join(chosen.scales)}; choose with --scale"
        )
    return chosen, chosen.scales[known], known


def arms_at(study: Study, study_name: str, scale: str) -> list[str]:
    """Names of all arms that a study has at a scale, in its order.

    Raises:
        InputError: unknown scale, or none.
    """
    names = [name for name, arm in study.arms.items() if scale in arm.scales]
    if not names:
        raise InputError(f"study {study_name} has no scale {scale!r}: it has {', '.join(study.scales)}")
    return names
