"""The network that an audit compares with."""

import numpy as np
import torch

from shared.audits.reference_model import retrained
from shared.data.image_set import ImageCache
from shared.diffusion.uvit import build_model
from shared.experiment.config import parse_experiment


def test_the_weights_of_the_last_step_come_out_however_often_the_experiment_averages():
    images = ImageCache(lambda: np.random.default_rng(0).integers(0, 256, (4, 3, 8, 8), np.uint8), 4, 8)
    torch.manual_seed(0)
    start = build_model(parse_experiment("[model]\nimage_size = 8"))
    found = []
    for text in ("", "[optim]\nema_every = 10\nema_warmup = 'power'"):
        experiment = parse_experiment(f"[model]\nimage_size = 8\n{text}")
        found.append(retrained(start, experiment, images, 3, lr=1e-2, ema_decay=0.0))
    for (name, ours), theirs in zip(found[0].named_parameters(), found[1].parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert not torch.equal(found[0].embedding.weight, start.embedding.weight)
