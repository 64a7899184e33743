"""How long arms will take on this machine, told before they begin."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

from server.studies.run.arm_folders import END_FILE, POINTS_FOLDER, RESULT_FILE, folder_of
from server.studies.run.arm_plan import plan
from server.studies.schema import Study
from server.studies.study_files import arm_at
from shared.diffusion.samplers import time_grid
from shared.diffusion.schedule import make_schedule
from shared.experiment.config import Experiment, load_experiment
from shared.experiment.recipes import find_experiment
from shared.planning.speed_probe import images_per_second
from shared.planning.workload import duration
from shared.training.flops import train_flops, training_flops

PROBE_SECONDS = 2.0
_WHOLE = {"train": {"objective": "dsm"}, "mask": {"kind": "none", "ratio": 0.0}}


def estimate(
    study: Study,
    study_name: str,
    names: Sequence[str],
    scale: str,
    root: Path,
    seeds: Sequence[int] = (0,),
    *,
    end_images: int = 0,
) -> str:
    """One line: hours of training and of sampling of all arms without a result, by a probe of one of their steps.

    `root` is the folder of all runs, `end_images` are generated at the end of each arm beside those of its points.
    Features are not counted, nor what runs beside this; a federated arm is counted as if its sites took turns.

    Raises:
        InputError: no such arm, or not at that scale.
    """
    left, training, sampling = [], 0.0, 0.0
    rate = 0.0
    for seed, name in itertools.product(seeds, names):
        arm, stage, known = arm_at(study, study_name, name, scale)
        folder, at_end = folder_of(root, study_name, known, name, seed), end_images if arm.test else 0
        at_end = 0 if (folder / POINTS_FOLDER / END_FILE).exists() else at_end
        is_done = (folder / RESULT_FILE).exists()
        if is_done and not at_end:
            continue
        overrides = [f"{key}={json.dumps(value)}" for key, value in stage.settings.items()]
        experiment = load_experiment(find_experiment(stage.recipe), overrides)
        flops, milestones = training_flops(experiment), plan(experiment, arm, stage).milestones
        # The probe makes no step of the optimizer.
        rate = rate or images_per_second(experiment, PROBE_SECONDS) * train_flops(experiment)
        generated = 0 if is_done or not arm.test else len(milestones) * study.scales[known].generated
        training += 0.0 if is_done else milestones[-1].images * flops / rate
        sampling += (generated + at_end) * _sampling_flops(experiment) / rate
        left.append(name)
    if not left:
        return "estimate: every arm has its result"
    wanted = len(names) * len(seeds)
    return (
        f"estimate for {len(left)} of {wanted} arms on this machine: {duration(training)} of training, "
        f"{duration(sampling)} of sampling, features not counted"
    )


def _sampling_flops(experiment: Experiment) -> float:
    """Operations of one image: a forward pass of the whole image, a third of a step, at every evaluation."""
    options, diffusion = experiment.evaluation, experiment.diffusion
    whole = Experiment.model_validate({**experiment.model_dump(), **_WHOLE})
    grid = time_grid(make_schedule(diffusion.schedule, diffusion.timesteps), options.sampler, options.steps)
    return len(grid) * train_flops(whole) / 3
