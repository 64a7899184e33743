"""Central training: masked pre-training and DSM are one command, on one process or under torchrun."""

import logging
import shlex
import sys
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from server.runs.lineage import as_provenance, charges_of_images, charges_of_weights
from server.runs.run_directory import RunDir, create
from server.training.images_of_run import check_images
from server.training.progress_bars import decoding_bar
from server.training.stopping import StopWish, stop_signals
from server.training.watch import Watch
from shared.data.image_cache import open_images
from shared.data.image_set import ImageCache, Images, ResidentImages
from shared.data.images import ignored_text
from shared.errors import InputError
from shared.experiment.config import Experiment
from shared.seeding import Streams
from shared.storage.checkpoint import (
    load_group,
    load_meta,
    prune_checkpoints,
    resolve_checkpoint,
    save_checkpoint,
)
from shared.training.engine import Engine, StepResult, decide_precision, run_training
from shared.training.precision import speed_up_float32
from shared.training.processes import World, joined_world
from shared.training.weights import load_weights, new_model

# Every so many steps processes agree whether one of them was told to stop.
AGREE_EVERY_STEPS = 10
# Share of a GPU's free memory that decoded images may take.
RESIDENT_SHARE = 0.25

log = logging.getLogger(__name__)


def train(
    experiment: Experiment,
    data: Path,
    out: Path,
    init: Path | None = None,
    *,
    accept_other_data: bool = False,
    on_ready: Callable[[Experiment], None] = lambda _: None,
) -> RunDir:
    """Train a stage into a run directory; a run of the same experiment that is there goes on where it was.

    Ctrl-C (or SIGTERM) ends after the running step, with a checkpoint.

    Args:
        experiment: what to train; its `train.init` is replaced by `init` when given.
        data: anything `shared.data.image_cache.open_images` takes.
        out: run directory, new or of the same experiment.
        init: checkpoint or run directory whose EMA weights the stage starts from.
        accept_other_data: go on although the run was trained on other images so far; that is recorded.
        on_ready: told the experiment once everything that was given fits, before the first step.

    Raises:
        InputError: bad data, a run directory of something else, of other images or with another writer, or a checkpoint
            that does not fit.
        NonFiniteLossError: training diverged; the newest checkpoint is from before.
    """
    if init is not None:
        experiment = _changed(experiment, init=str(init))
    with joined_world() as world, RunDir(out).hold() if world.is_main else nullcontext():
        speed_up_float32()
        experiment = _changed(experiment, precision=_precision(experiment, out, world))
        images = _open(data, experiment, world)
        streams = Streams(experiment.train.seed, ("train",))
        model = new_model(experiment, streams)
        parents = _start_weights(model, experiment)
        engine = Engine(experiment, model, streams, world)
        run = create(out, experiment) if world.is_main else RunDir(out)
        world.wait()
        parents = _resume(engine, run) or parents
        change = ""
        if world.is_main:
            change = check_images(run, images, data, step=engine.steps_done, accept_other=accept_other_data)
            on_ready(experiment)
        world.wait()
        with ExitStack() as stack:
            session = _Session(engine, run, data, images, parents)
            session.provenance |= _charged(data, experiment, run)
            if world.is_main:
                session.watch = stack.enter_context(Watch(engine, run, len(images), session.provenance))
                if change:
                    session.watch.log.write("data_changed", step=engine.steps_done, reason=change)
            session.stop = stack.enter_context(stop_signals())
            run_training(engine, _resident(images, world), steps=experiment.train.steps, on_step=session.on_step)
            session.finish()
    return run


class _Session:
    """What happens between steps: figures, checkpoints, sample grids, and the wish to stop."""

    def __init__(self, engine: Engine, run: RunDir, data: Path, images: ImageCache, parents: tuple[str, ...]) -> None:
        self.engine, self.run, self.parents = engine, run, parents
        self.watch: Watch | None = None
        self.stop = StopWish()
        self.saved_step = engine.steps_done if run.latest else -1
        device = engine.device
        self.provenance: dict[str, Any] = {
            "command": shlex.join(["maskfed-server", *sys.argv[1:]]),
            "data": str(data),
            "num_images": len(images),
            "images_sha256": images.fingerprint,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "processes": engine.world.size,
            "threads": torch.get_num_threads(),
            "precision": engine.precision,
        }

    def on_step(self, step: int, result: StepResult) -> bool:
        options = self.engine.experiment.train
        if self.watch:
            self.watch.note(step, result)
        if step % options.checkpoint_every == 0:
            self.save()
        if step % options.sample_every == 0:
            self.sample()
        world = self.engine.world
        if world.size > 1 and step % AGREE_EVERY_STEPS:
            return False
        return world.any(bool(self.stop))

    def save(self) -> None:
        """Write a checkpoint of now; one process does, all have the same weights."""
        step, options = self.engine.steps_done, self.engine.experiment.train
        if self.watch and step != self.saved_step:
            with self.watch.paused():
                folder = self.run.step_checkpoint(step)
                meta = {
                    "experiment": self.engine.experiment,
                    "step": step,
                    "parents": self.parents,
                    "provenance": self.provenance,
                }
                digest = save_checkpoint(folder, self.engine.groups(), meta).digest
                prune_checkpoints(self.run.checkpoints, options.keep_last, options.keep_every)
            self.watch.log.write("checkpoint", step=step, digest=digest, path=folder.relative_to(self.run.path))
        self.saved_step = step

    def sample(self) -> None:
        """Draw a grid, unless somebody waits for the end: none is needed to go on."""
        if self.watch:
            self.stop.do_unless_stopped(self.watch.sample)

    def finish(self) -> None:
        self.save()
        done, wanted = self.engine.steps_done, self.engine.experiment.train.steps
        self.sample()
        if self.watch:
            self.watch.end("finished" if done >= wanted else "stopped", done)
            if done < wanted:
                log.info("stopped after step %d of %d; run the same command again to continue", done, wanted)


def _open(data: Path, experiment: Experiment, world: World) -> ImageCache:
    # The first process decodes, the others find the cache.
    size = experiment.model.image_size
    images = None
    if world.is_main:
        with decoding_bar() as on_progress:
            images = open_images(data, size, on_progress=on_progress)
        if images.num_unreadable:
            log.warning("%d of the image files are unreadable and left out", images.num_unreadable)
        if images.ignored:
            log.warning("%s", ignored_text(images.ignored))
    world.wait()
    return images or open_images(data, size)


def _resident(images: ImageCache, world: World) -> Images:
    if world.device.type != "cuda":
        return images
    free, _ = torch.cuda.mem_get_info(world.device)
    fits = len(images) * 3 * images.size**2 < RESIDENT_SHARE * free
    return ResidentImages(images, world.device) if fits else images


def _precision(experiment: Experiment, out: Path, world: World) -> str:
    # A run that goes on keeps what it was started with, whatever this machine prefers.
    stored = RunDir(out)
    if experiment.train.precision == "auto" and stored.experiment_file.exists():
        return stored.experiment.train.precision
    return decide_precision(experiment, world.device)


def _start_weights(model: nn.Module, experiment: Experiment) -> tuple[str, ...]:
    if not experiment.train.init:
        return ()
    folder = resolve_checkpoint(Path(experiment.train.init))
    try:
        load_weights(model, load_group(folder, "ema"))
    except InputError as error:
        raise InputError(f"--init {folder}: {error}") from error
    return (load_meta(folder).digest,)


def _resume(engine: Engine, run: RunDir) -> tuple[str, ...]:
    newest = run.latest
    if newest is None:
        return ()
    engine.load_groups({name: load_group(newest, name) for name in ("model", "ema", "optimizer")})
    log.info("continuing after step %d", engine.steps_done)
    return load_meta(newest).parents


def _charged(data: Path, experiment: Experiment, run: RunDir) -> dict[str, Any]:
    """What sites were charged for these images, for those of earlier steps, or for the weights at the start."""
    before = [folder for folder in (experiment.train.init and Path(experiment.train.init), run.latest) if folder]
    metas = [load_meta(resolve_checkpoint(folder)) for folder in before]
    return as_provenance(charges_of_images(data), *(charges_of_weights(meta.provenance) for meta in metas))


def _changed(experiment: Experiment, **fields: str) -> Experiment:
    return experiment.model_copy(update={"train": experiment.train.model_copy(update=fields)})
