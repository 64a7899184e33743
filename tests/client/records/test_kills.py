"""A small version of `python -m benchmarks.ledger`: kills at random points never leave less on disk than was spent."""

from pathlib import Path

from benchmarks.ledger import run_kills


def test_killed_rounds_are_never_under_counted(tmp_path: Path):
    outcome = run_kills(tmp_path.resolve(), kills=12, seed=1)
    assert outcome["trainings"] > 0
    assert outcome["under-counted"] == outcome["damaged"] == 0
