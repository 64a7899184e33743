"""A short denoising training of a copy of a network, for the models that audits compare with. The original stays."""

from copy import deepcopy
from typing import Any

import numpy as np
from torch import nn

from shared.data.image_set import Images
from shared.experiment.config import Experiment
from shared.seeding import Streams
from shared.training.engine import Engine

BATCH = 32


def retrained(start: nn.Module, experiment: Experiment, images: Images, steps: int, **optim: Any) -> nn.Module:  # noqa: ANN401  # fields of `[optim]`
    """A copy of `start` after DSM on `images`; in evaluation mode.

    Args:
        start: the network; not changed.
        experiment: its geometry and schedule, the settings of the optimizer.
        images: source of uint8 images.
        steps: optimizer steps, of at most `BATCH` images each.
        optim: settings of the optimizer that differ from the experiment's.

    Returns:
        The averaged weights, as models are audited; with `ema_decay` 0 those of the last step.
    """
    tree = experiment.model_dump()
    tree["train"] |= {"batch": min(BATCH, len(images)), "objective": "dsm", "accumulation": 1}
    tree["mask"] |= {"kind": "none", "ratio": 0.0}
    # The average of the last step, whenever the experiment's own would be due.
    tree["optim"] |= {"warmup_steps": 0, "ema_every": 1, **optim}
    tree["privacy"] |= {"mechanism": "none"}
    tree["data"] |= {"horizontal_flip": False}
    chosen = Experiment.model_validate(tree)
    engine = Engine(chosen, deepcopy(start).train(), Streams(0, ("retraining",)))
    order = np.random.default_rng(0)
    for _ in range(steps):
        rows = order.choice(len(images), chosen.train.batch, replace=False).astype(np.int64)
        engine.step(images.batch(rows).to(engine.device))
    engine.finite_check.settle()
    engine.ema.copy_to(engine.model)
    return engine.model.eval().requires_grad_(False)
