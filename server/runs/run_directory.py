"""The run directory: where everything that a run writes has its place. No torch here."""

import json
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import InputError
from shared.experiment.config import Experiment, load_experiment
from shared.storage.checkpoint import latest_checkpoint
from shared.storage.files import locked, write_atomically

# What may change between a run and its continuation: none of it alters the numbers of a step that is done.
_FREE = frozenset(
    {
        "train.steps",
        "train.checkpoint_every",
        "train.sample_every",
        "train.keep_last",
        "train.keep_every",
    }
)
_WRITER_FILE = ".writer.lock"
_FREE_SECTIONS = frozenset({"evaluation"})


@dataclass(frozen=True)
class RunDir:
    """Paths of one run."""

    path: Path

    @property
    def experiment_file(self) -> Path:
        """The resolved experiment, `experiment.toml`."""
        return self.path / "experiment.toml"

    @property
    def checkpoints(self) -> Path:
        """Folder of `step-*` or `round-*` checkpoints."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """Run log, `metrics.jsonl`."""
        return self.path / "metrics.jsonl"

    @property
    def settings(self) -> Path:
        """`finetune.json`: what a federated run started from, and how its rounds are evaluated."""
        return self.path / "finetune.json"

    @property
    def stored_settings(self) -> dict[str, Any]:
        """What `finetune.json` holds; nothing where it is missing or damaged."""
        try:
            value = json.loads(self.settings.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return value if isinstance(value, dict) else {}

    @property
    def progress(self) -> Path:
        """`progress.json`: what a federated run does now."""
        return self.path / "progress.json"

    @property
    def tensorboard(self) -> Path:
        """Folder of event files."""
        return self.path / "tensorboard"

    @property
    def samples(self) -> Path:
        """Folder of sample grids."""
        return self.path / "samples"

    @property
    def report(self) -> Path:
        """`report.html`."""
        return self.path / "report.html"

    @property
    def experiment(self) -> Experiment:
        """The resolved experiment of the run.

        Raises:
            InputError: not a run directory.
        """
        if not self.experiment_file.exists():
            raise InputError(f"run {self.path}: no {self.experiment_file.name} in it; give a run directory")
        return load_experiment(self.experiment_file)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Be the run's one writer: no other process can, until this one lets go or ends. The folder is made.

        Raises:
            InputError: another process writes it, who is named; or the folder holds something else.
        """
        _refuse_foreign(self)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"run {self.path}: {error.strerror}; name a folder that can be written") from error
        with locked(self.path / _WRITER_FILE, f"run {self.path} is being written by"):
            try:
                yield
            finally:
                if not self.experiment_file.exists():
                    # No run came of it: nothing half-made stays.
                    (self.path / _WRITER_FILE).unlink(missing_ok=True)
                    for folder in (self.checkpoints, self.samples, self.path):
                        with suppress(OSError):
                            folder.rmdir()

    def evaluation(self, name: str) -> Path:
        """Folder of the evaluation called `name`."""
        return self.path / "evaluation" / name

    def step_checkpoint(self, step: int) -> Path:
        """Folder of the checkpoint after `step` optimizer steps."""
        return self.checkpoints / f"step-{step:09d}"

    def round_checkpoint(self, server_round: int) -> Path:
        """Folder of the checkpoint after `server_round` rounds."""
        return self.checkpoints / f"round-{server_round:06d}"

    @property
    def latest(self) -> Path | None:
        """Newest complete checkpoint."""
        return latest_checkpoint(self.checkpoints)


def create(path: Path, experiment: Experiment) -> RunDir:
    """Make the run directory of an experiment, or open it when it holds a run of the same experiment.

    Settings that change no number (steps, checkpoint intervals, evaluation) may differ: the new ones are written down.

    Raises:
        InputError: the folder holds something else, or a run with other settings; the line lists them.
    """
    run = RunDir(path)
    _refuse_foreign(run)
    if run.experiment_file.exists() and (found := differences(run.experiment, experiment)):
        listed = "; ".join(map(str, found))
        raise InputError(f"run {path} was started with {listed}: name a new folder, or ask for the same experiment")
    try:
        for folder in (path, run.checkpoints, run.samples):
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"run {path}: {error.strerror}; name a folder that can be written") from error
    write_atomically(run.experiment_file, experiment.to_toml())
    return run


def _refuse_foreign(run: RunDir) -> None:
    if run.path.exists() and not run.path.is_dir():
        raise InputError(f"run {run.path} is a file: name a folder")
    if run.experiment_file.exists() or not run.path.exists():
        return
    if any(each.name != _WRITER_FILE for each in run.path.iterdir()):
        raise InputError(f"run {run.path} is not empty and holds no run: name a new folder")


@dataclass(frozen=True)
class Difference:
    """A field in which two experiments would train differently; as text `section.key = stored, not asked`."""

    field: str
    """`section.key`."""
    stored: Any
    asked: Any

    def __str__(self) -> str:
        return f"{self.field} = {self.stored!r}, not {self.asked!r}"


def differences(stored: Experiment, asked: Experiment) -> list[Difference]:
    """Fields in which two experiments would train differently, in the order of the experiment."""
    ours, theirs = (tomllib.loads(experiment.to_toml()) for experiment in (stored, asked))
    return [
        Difference(key, ours_value, theirs_value)
        for key, ours_value, theirs_value in _pairs(ours, theirs)
        if ours_value != theirs_value and key not in _FREE and key.partition(".")[0] not in _FREE_SECTIONS
    ]


def _pairs(ours: dict[str, Any], theirs: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    return [
        (f"{section}.{field}", value, theirs[section][field])
        for section, fields in ours.items()
        for field, value in fields.items()
    ]
