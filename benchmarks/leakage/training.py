"""Images of one seed, and the trainings of one mask ratio: target and shadow, before and after fine-tuning.

The shadow is trained like the target on other images: what makes an image easy for both cancels in the attack.
"""

from copy import deepcopy
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from shared.data.image_set import ImageCache
from shared.experiment.config import Experiment
from shared.seeding import Streams
from shared.training.engine import Engine
from shared.training.flops import train_flops
from shared.training.weights import new_model

SIZE, MEMBERS, OTHERS = 32, 32, 200
BATCH = 16
STAGE_FLOPS, TUNING_FLOPS = 8e12, 3e12
"""Of each training, whatever its mask: about 180 epochs of whole images, and 70 of the fine-tuning's. Enough to learn
`MEMBERS` images partly by heart, and an arm with its attacks in a quarter of an hour of one core."""
RATIOS = {"whole": 0.0, "half": 0.5, "most": 0.9}


@dataclass(frozen=True)
class Images:
    """Of one seed; nobody is in two of them, and the first three have one image a person.

    Attributes:
        members: what the target sees in its first stage.
        shadow: what the shadow sees instead.
        tuning: what both are fine-tuned on.
        others: never seen by any.
        persons: of `others`.
    """

    members: Tensor
    shadow: Tensor
    tuning: Tensor
    others: Tensor
    persons: NDArray[np.int64]


def divide(images: ImageCache, seed: int) -> Images:
    """Whole persons in a seeded order.

    Raises:
        SystemExit: no folders by person, or too few persons.
    """
    if images.persons is None:
        raise SystemExit("leakage: images in folders by person are needed")
    names = np.random.default_rng(seed).permutation(np.unique(images.persons))
    if len(names) < 3 * MEMBERS + OTHERS:
        raise SystemExit(f"leakage: {len(names)} persons, at least {3 * MEMBERS + OTHERS} are needed")
    first = np.array([np.flatnonzero(images.persons == name)[0] for name in names[: 3 * MEMBERS + OTHERS]])
    parts = np.split(first, [MEMBERS, 2 * MEMBERS, 3 * MEMBERS])
    return Images(*(images.batch(part) for part in parts), persons=np.asarray(images.persons[parts[3]], np.int64))


def experiment(ratio: float, seed: int) -> Experiment:
    """Masked score matching at a ratio; 0: denoising score matching."""
    mask = {"kind": "block", "ratio": ratio, "block_size": 2} if ratio else {"kind": "none", "ratio": 0.0}
    return Experiment.model_validate(
        {
            "train": {"objective": "msm" if ratio else "dsm", "batch": BATCH, "seed": seed, "precision": "float32"},
            "model": {"size": "T", "image_size": SIZE, "patch_size": 4},
            "mask": mask,
            "diffusion": {"schedule": "cosine", "prediction": "v"},
            "data": {"horizontal_flip": False},
            "optim": {"lr": 8e-4, "warmup_steps": 50, "ema_decay": 0.99},
            "evaluation": {"sampler": "dpm++", "steps": 20, "eta": 0.0},
        }
    )


def steps_for(plan: Experiment, flops: float) -> int:
    """Steps with as many operations."""
    return round(flops / train_flops(plan) / plan.train.batch)


def first_stage(ratio: float, images: Tensor, seed: int) -> nn.Module:
    """From a random start, the same for every ratio."""
    plan = experiment(ratio, seed)
    return trained(new_model(plan, Streams(seed, ("leakage",))), plan, images, steps_for(plan, STAGE_FLOPS))


def fine_tuned(model: nn.Module, images: Tensor, seed: int) -> nn.Module:
    """A copy after denoising score matching on other images."""
    plan = experiment(0.0, seed)
    return trained(deepcopy(model), plan, images, steps_for(plan, TUNING_FLOPS))


def trained(model: nn.Module, plan: Experiment, images: Tensor, steps: int) -> nn.Module:
    """The averaged weights after so many steps on the images, in evaluation mode."""
    engine = Engine(plan, model.train().requires_grad_(True), Streams(plan.train.seed, ("leakage", plan.mask.kind)))
    order = np.random.default_rng(plan.train.seed)
    for _ in range(steps):
        engine.step(images[order.choice(len(images), plan.train.batch, replace=False)])
    engine.ema.copy_to(engine.model)
    return engine.model.eval().requires_grad_(False)
