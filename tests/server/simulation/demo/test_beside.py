"""Two distances differ when those of the same seeds do; where seeds, networks or references differ nothing is said."""

from pathlib import Path
from typing import Any

import pytest

from server.report.beside import Beside, Model
from server.runs.history import Evaluation
from server.simulation.demo.beside import difference, lines, measure_distances


def evaluation(value: float, left_out: list[float], **facts: Any) -> Evaluation:
    result = {"left_out": left_out, "seed": 0, "num_images": 200, "reference": {"name": "held-out"}} | facts
    return Evaluation(1, "fd_x", value, result)


WAVES = [0.3, -0.1, 0.25, -0.2, 0.1]
OWN = evaluation(0.5, [0.5 + each for each in WAVES])


def test_what_the_images_of_a_seed_have_in_common_falls_out():
    other = evaluation(0.7, [0.7 + each + 0.01 * place for place, each in enumerate(WAVES)])
    low, high = difference(other, OWN)  # type: ignore[misc]
    # The differences of the five are 0.2, 0.21, ... 0.24; Student's t for 4 degrees of freedom is 2.776.
    half = 2.776 * (4 / 5 * sum((0.01 * place - 0.02) ** 2 for place in range(5))) ** 0.5
    assert (low, high) == (pytest.approx(0.2 - half), pytest.approx(0.2 + half))


@pytest.mark.parametrize(
    "facts",
    [{"seed": 1}, {"num_images": 100}, {"reference": {"name": "others"}}, {"extractor": {"sha256": "ab"}},
     {"left_out": [0.1, 0.2, 0.3]}, {"left_out": []}],
    ids=["seed", "number", "reference", "network", "groups", "older version"],
)  # fmt: skip
def test_what_was_measured_in_another_way_has_no_difference(facts: dict[str, Any]):
    assert difference(evaluation(0.7, **{"left_out": [0.7] * 5} | facts), OWN) is None


def test_the_table_tells_the_difference_and_the_verdict_follows_it():
    own = Model(name="private", loss=0.08, distance=0.5, distance_interval=(0.2, 0.8))
    other = Model(name="start", loss=0.09, loss_difference=(0.001, 0.002), distance=0.7, distance_interval=(0.4, 1.0),
                  distance_difference=(0.1, 0.3))  # fmt: skip
    said = list(lines(Beside(metric="fd_x", num_loss_images=300, num_images=200, models=(own, other))))
    assert "+0.100 to +0.300" in said[2]
    assert said[-1] == "  private against start: loss better, distance better"


class Noted:
    """Commands that are not run: what they were, and what lay there when they were asked for."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, bool]] = []

    def run(self, *command: str, log: str) -> None:
        self._note(command)
        kept = Path(command[2]) / "evaluation" / "references"
        kept.mkdir(parents=True)
        (kept / "statistics").write_text("kept")

    def together(self, commands: list[tuple[str, ...]]) -> None:
        for command in commands:
            self._note(command)

    def _note(self, command: tuple[str, ...]) -> None:
        assert command[3:] == ("--reference", "held-out", "--num", "250")
        kept = Path(command[2]) / "evaluation" / "references" / "statistics"
        self.seen.append((Path(command[2]).name, kept.exists()))


def test_features_of_the_reference_are_computed_once(tmp_path: Path):
    noted = Noted()
    measure_distances(noted, [tmp_path / name for name in "abc"], Path("held-out"), 250)  # type: ignore[arg-type]
    assert noted.seen == [("a", False), ("b", True), ("c", True)]
