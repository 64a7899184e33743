"""Stored results of a study's arms, `server/results/<study>-<scale>-<arm>.json`: numbers and where they come from.

Of another seed than 0 `<study>-<scale>-<arm>-seed-<n>.json`.
"""

import json
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from server.studies.schema import Scale
from shared.errors import InputError
from shared.experiment.base import Section
from shared.experiment.config import explain
from shared.storage.files import write_atomically

SCHEMA_VERSION = 1
FOLDER = Path(__file__).parents[1] / "results"
SYNTHETIC = "synthetic"
"""Folder in it for results on synthetic faces, which may have pictures."""

HELD_OUT_LOSS = "held_out_loss_of_v"
"""Name under which the denoising loss on the test split stands among the distances; it has no feature network."""

Metrics = dict[str, dict[str, dict[str, float]]]
"""By reference (`test`, `validation`), distance name, and `distance`, `kernel`, `precision` or `recall`; the first two
with `_low` and `_high`, their 95 percent intervals over the draw of the generated images, where measured."""


class CurvePoint(Section):
    """One place of an arm's curve."""

    images: int
    """Image presentations so far in this arm, over all sites."""
    steps: int
    """Optimizer steps; of one site in a federated arm."""
    flops: float
    """Floating-point operations of the training so far, in this arm."""
    metrics: Metrics = Field(default_factory=dict)
    copied: dict[str, float] = Field(default_factory=dict)
    """Share of generated images that are copies of training images: by `pixels`, and by distance name."""


class EndPoint(Section):
    """The end of an arm measured once more, with many images: Frechet distances of few are mostly bias."""

    num_images: int
    metrics: dict[str, dict[str, float]]
    """Of the test split, by distance name: as in `Metrics`."""
    extractors: dict[str, str]
    """Digest of each extractor's weights, by distance name."""
    seconds: float


class Init(Section):
    """The arm that an arm starts from."""

    arm: str
    checkpoint: str
    images: int
    """Image presentations before this arm, all stages together."""
    steps: int
    flops: float


class ArmResult(Section):
    """What one arm came to."""

    schema_version: int = Field(SCHEMA_VERSION, alias="schema")
    study: str
    arm: str
    scale: Scale
    curve: tuple[CurvePoint, ...] = Field(min_length=1)
    init: Init | None = None
    sites: int = 0
    experiment: dict[str, dict[str, Any]]
    """Resolved sections of the experiment."""
    data: dict[str, dict[str, str | int]]
    """By role: name of the image set, split, images, persons, digest of all pixels."""
    training_images: Metrics = Field(default_factory=dict)
    """As `metrics`, of as many training images in place of generated ones: what copying everything would get."""
    extractors: dict[str, str]
    """Digest of each extractor's weights, by distance name; the first chooses among points. Empty for a loss."""
    end: EndPoint | None = None
    measured: dict[str, Any] = Field(default_factory=dict)
    """How: images generated, sampler, evaluations, seed, precision."""
    training_seconds: float
    measuring_seconds: float
    threads: int
    hardware: str
    versions: dict[str, str]
    commit: str | None
    command: str
    date: str

    @property
    def seed(self) -> int:
        """Of the training: start, order of images, time steps, noise."""
        return int(self.experiment.get("train", {}).get("seed", 0))

    @property
    def last(self) -> CurvePoint:
        """The end of the training."""
        return self.curve[-1]

    @property
    def has_intervals(self) -> bool:
        """Whether every distance has its interval; arms that ran before they were measured have none."""
        return all(
            "distance_low" in values
            for point in self.curve
            for by_distance in point.metrics.values()
            for values in by_distance.values()
        )

    @property
    def total_flops(self) -> float:
        """Of this arm and all stages before it."""
        return self.last.flops + (self.init.flops if self.init else 0.0)


def result_file(folder: Path, study: str, scale: str, arm: str, seed: int = 0) -> Path:
    """Where a stored result lies."""
    return folder / f"{study}-{scale}-{seeded(arm, seed)}.json"


def seeded(arm: str, seed: int) -> str:
    """An arm with its seed, as files and folders are named."""
    return f"{arm}-seed-{seed}" if seed else arm


def write_result(result: ArmResult, path: Path) -> None:
    """Write a result so that a reader sees all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(result.model_dump(mode="json", by_alias=True), indent=1) + "\n")


def read_result(path: Path) -> ArmResult:
    """Read a stored result.

    Raises:
        InputError: not readable, or of another schema.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"result {path.name}: not readable JSON ({error}): restore it, or run its arm again"
        ) from error
    schema = tree.get("schema") if isinstance(tree, dict) else None
    if schema != SCHEMA_VERSION:
        raise InputError(
            f"result {path.name}: schema {schema!r}, this version reads {SCHEMA_VERSION}: run its arm again"
        )
    try:
        return ArmResult.model_validate(tree)
    except ValidationError as error:
        raise InputError(f"result {path.name}: {explain(error)}") from error


def read_results(folder: Path) -> dict[tuple[str, str, str], list[ArmResult]]:
    """All stored results by study, scale and arm; in a list those of all seeds, the smallest first.

    Raises:
        InputError: one is damaged, of another schema, or does not have the name of what it holds.
    """
    found: dict[tuple[str, str, str], list[ArmResult]] = {}
    for path in sorted(folder.glob("*.json")):
        result = read_result(path)
        right = result_file(folder, result.study, result.scale, result.arm, result.seed)
        if right != path:
            raise InputError(f"result {path.name} holds what belongs into {right.name}: give it that name")
        found.setdefault((result.study, result.scale, result.arm), []).append(result)
    return {key: sorted(results, key=lambda each: each.seed) for key, results in found.items()}
