"""What a training shows while it runs: progress bar, run log, live curves, sample grids."""

import itertools
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from server.runs.run_directory import RunDir
from server.training.heartbeat import Heartbeat
from server.training.progress_bars import training_bar
from shared.diffusion.uvit import build_model
from shared.experiment.config import Experiment, parse_experiment
from shared.experiment.learning_rate import lr_at
from shared.storage.checkpoint import load_meta
from shared.storage.runlog import RunLog
from shared.storage.synthetic_mark import SyntheticMark, seed_range
from shared.storage.versions import git_commit, installed_versions
from shared.training.engine import Engine, StepResult

LOG_EVERY_STEPS = 10
SPEAK_EVERY_SECONDS = 30.0
GRID_IMAGES, GRID_COLUMNS, GRID_BATCH = 32, 8, 8
# Grids are for the eye: the solver that needs few evaluations.
GRID_SAMPLER = ("evaluation.sampler=dpm++", "evaluation.steps=20")

_log = logging.getLogger(__name__)


class Watch:
    """Figures of one training, written by its first process; use as a context."""

    def __init__(self, engine: Engine, run: RunDir, num_images: int, provenance: dict[str, Any]) -> None:
        self.engine, self.run, self.log = engine, run, RunLog(run.metrics)
        self._provenance, self._num_images = provenance, num_images
        self._bar = training_bar()
        self._heart = Heartbeat(_log.info, SPEAK_EVERY_SECONDS)
        self._since = time.perf_counter()
        self._losses: list[Tensor] = []

    def __enter__(self) -> Self:
        """Note the start and show the bar."""
        experiment = self.engine.experiment
        self.log.write(
            "start",
            step=self.engine.steps_done,
            realised_mask_ratio=experiment.realised_mask_ratio,
            versions=installed_versions(),
            commit=git_commit(),
            **self._provenance,
        )
        self._curves = SummaryWriter(str(self.run.tensorboard))
        self._task = self._bar.add_task(
            experiment.train.objective, total=experiment.train.steps, completed=self.engine.steps_done, rate="", loss=""
        )
        self._bar.start()
        self._doing(self.engine.steps_done)
        if not self._bar.console.is_terminal:
            self._heart.start()
        self._since = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the bar down; an exception is noted as the end of the run."""
        self._heart.stop()
        self._bar.stop()
        self._curves.close()
        if error is not None:
            # Whoever stops a training at once loses nothing where its newest step is already a checkpoint.
            is_whole = self.run.latest == self.run.step_checkpoint(self.engine.steps_done)
            status = "stopped" if isinstance(error, KeyboardInterrupt) and is_whole else "failed"
            reason = f"{type(error).__name__}: {error}"
            self.log.write("end", status=status, step=self.engine.steps_done, reason=reason)

    def note(self, step: int, result: StepResult) -> None:
        """Take up a step; figures are written every few steps, so that a GPU is not waited for at each."""
        self._losses.append(result.loss_tensor)
        self._doing(step)
        if step % LOG_EVERY_STEPS == 0 or step == self.engine.experiment.train.steps:
            self._write(step, result)
        else:
            self._bar.update(self._task, completed=step)

    def end(self, status: str, step: int) -> None:
        """Note the end of the run: `finished` or `stopped`."""
        self.log.write("end", status=status, step=step)

    def sample(self) -> None:
        """Write a grid of the averaged weights, always of the same seeds, as `samples/step-*.png`."""
        from shared.evaluation.generate import sample_images, save_grid

        path = self.run.samples / f"{self.run.step_checkpoint(self.engine.steps_done).name}.png"
        if path.exists():
            return
        with self.paused():
            experiment = grid_experiment(self.engine.experiment)
            model = build_model(experiment).to(self.engine.device).eval().requires_grad_(False)
            self.engine.ema.copy_to(model)
            drawn = itertools.count(GRID_BATCH, GRID_BATCH)
            self._heart.does("drawing samples")
            images: Tensor = sample_images(
                model,
                experiment,
                range(GRID_IMAGES),
                GRID_BATCH,
                self.engine.device,
                precision=self.engine.precision,
                on_batch=lambda _: self._drew(next(drawn)),
            )
            save_grid(images, path, GRID_COLUMNS, SyntheticMark(self._digest(), seed_range(0, GRID_IMAGES)))

    def _drew(self, number: int) -> None:
        self._bar.update(self._task, rate=f"samples {number}/{GRID_IMAGES}")
        self._heart.does(f"drawing samples, {number} of {GRID_IMAGES} are done")

    def _doing(self, step: int) -> None:
        self._heart.does(f"in step {step + 1} of {self.engine.experiment.train.steps}")

    def _digest(self) -> str:
        """Of the checkpoint with the weights of now; empty where this step has none."""
        folder = self.run.step_checkpoint(self.engine.steps_done)
        return load_meta(folder).digest if folder.exists() else ""

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that is not counted into images per second."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def _write(self, step: int, result: StepResult) -> None:
        experiment = self.engine.experiment
        loss, grad_norm = float(torch.stack(self._losses).mean()), result.grad_norm
        now = time.perf_counter()
        rate = len(self._losses) * experiment.train.batch / (now - self._since)
        lr = lr_at(step - 1, experiment.optim)
        images = step * experiment.train.batch
        self.log.write("train", step=step, loss=loss, images=images, images_per_second=rate, grad_norm=grad_norm, lr=lr)
        for name, value in (("loss", loss), ("images_per_second", rate), ("grad_norm", grad_norm), ("lr", lr)):
            self._curves.add_scalar(f"train/{name}", value, step)
        self._bar.update(self._task, completed=step, rate=f"{rate:,.0f} img/s", loss=f"loss {loss:.4f}")
        if not self._bar.console.is_terminal and self._heart.is_due:
            left = (experiment.train.steps - step) * experiment.train.batch / rate
            _log.info(
                "step %d of %d: %.0f img/s, loss %.4f, %.0f s left", step, experiment.train.steps, rate, loss, left
            )
            self._heart.spoke()
        self._since, self._losses = now, []


def grid_experiment(experiment: Experiment) -> Experiment:
    """The experiment with the sampler of grids: few evaluations, at most T."""
    steps = min(20, experiment.diffusion.timesteps)
    return parse_experiment(experiment.to_toml(), [GRID_SAMPLER[0], f"evaluation.steps={steps}"])
