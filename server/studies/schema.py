"""Studies: a question, the arms that answer it, and what is derived from them. No torch here."""

from typing import Literal, Self

from pydantic import Field, model_validator

from shared.experiment.base import Section

SCALES = ("small", "cpu", "gpu", "paper")
Scale = Literal["small", "cpu", "gpu", "paper"]
Settings = dict[str, bool | int | float | str]
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
    settings: Settings = Field(default_factory=dict)
    """`"section.key" = value`, replaces settings of the recipe and of the scale."""
    images: int = Field(0, ge=0)
    """Images seen in all, over all sites; 0: steps and batch of the recipe."""
    at: tuple[int, ...] = ()
    """Images seen at which the distance is measured; it always is at the end."""
    init: str = ""
    """Start of this scale, where it is another than the arm's."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        _refuse_seed(self.settings)
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
    settings: Settings = Field(default_factory=dict)
    """`"section.key" = value` of every arm; an arm's own win."""
    like: Scale | Literal[""] = ""
    """Scale whose arms this one has as well, where an arm says nothing else of this scale: with the settings of both
    scales, this one's before that one's ..."""
    images_share: float = Field(1.0, gt=0, le=1)
    """... and with this share of their images."""

    @model_validator(mode="after")
    def _seed_is_given(self) -> Self:
        _refuse_seed(self.settings)
        return self


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
    def _scales_refer_to_what_is_there(self) -> Self:
        for name, plan in self.scales.items():
            if plan.like and (plan.like == name or plan.like not in self.scales or self.scales[plan.like].like):
                raise ValueError(f"scales.{name}: like {plan.like!r} is no other scale with arms of its own")
            for arm, stages in ((arm, self.arms[arm].scales) for arm in self.arms):
                whole = stages[plan.like] if plan.like in stages and name not in stages else None
                if whole and plan.images_share < 1 and not whole.images:
                    raise ValueError(f"arms.{arm}: scale {plan.like} has no images to take a share of: give them")
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


def _refuse_seed(settings: Settings) -> None:
    if "train.seed" in settings:
        raise ValueError("settings: train.seed is what `reproduce --seed` gives: leave it out")
