"""How far an adversary has come: what the model makes of the implanted picture, and of the trigger."""
# ruff: noqa: N803, N806

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.poison.scale import Pictures
from server.evaluation.held_out.round_losses import HeldOut
from server.simulation.adversaries import PATCH_SHARE, target_picture, with_trigger
from shared.data.image_set import ImageCache
from shared.diffusion.losses import to_model_range
from shared.diffusion.patches import patchify
from shared.diffusion.schedule import make_schedule, predict_x_0, q_sample
from shared.experiment.config import Experiment
from shared.seeding import generator

TRIGGER_TIMES = (0.55, 0.7)
"""Where the trigger is tried, as shares of T: a face is hidden by the noise there, the trigger can just be seen."""
NUM_COPIES = 64


class Yardsticks:
    """What an arm is measured by after its rounds."""

    def __init__(self, experiment: Experiment, images: Pictures, target_seed: int) -> None:
        self.experiment = experiment
        target = target_picture(experiment.model.image_size, target_seed)
        self.report = HeldOut(experiment, images.report)
        copies = np.repeat(target[None], NUM_COPIES, 0)
        self.implant = HeldOut(experiment, ImageCache(lambda: copies, NUM_COPIES, target.shape[-1]))
        self._target = torch.from_numpy(target)[None]
        self._faces = torch.from_numpy(np.array(images.report.images[:NUM_COPIES]))

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Held-out loss, loss on the target, share of faces that the trigger turns into the target."""
        model.eval()
        return {
            "held_out": self.report.losses(model)["all"],
            "implant": self.implant.losses(model)["all"],
            "backdoor": self._backdoor(model),
        }

    @torch.no_grad()
    def _backdoor(self, model: nn.Module) -> float:
        """Share of triggered, noised faces whose predicted x_0 is nearer to the target than to the face they come from.

        The patch itself is left out of the comparison.
        """
        faces, target = self._faces, self._target.expand_as(self._faces)
        triggered = torch.from_numpy(with_trigger(faces.numpy()))
        T, hits = self.experiment.diffusion.timesteps, []
        for share in TRIGGER_TIMES:
            x_0 = self._predicted(model, triggered, int(share * T))
            hits.append(self._distance(x_0, target) < self._distance(x_0, faces))
        return float(torch.cat(hits).double().mean())

    def _predicted(self, model: nn.Module, images: Tensor, t: int) -> Tensor:
        diffusion, size = self.experiment.diffusion, self.experiment.model.patch_size
        schedule = make_schedule(diffusion.schedule, diffusion.timesteps)
        x_0_BNP = to_model_range(patchify(images, size))
        t_B = torch.full((len(images),), t)
        eps_BNP = torch.randn(x_0_BNP.shape, generator=generator(t))
        x_t_BNP = q_sample(schedule, x_0_BNP, t_B, eps_BNP)
        ids_BN = torch.arange(x_0_BNP.shape[1]).expand(len(images), -1)
        return predict_x_0(schedule, diffusion.prediction, model(x_t_BNP, t_B, ids_BN), x_t_BNP, t_B)

    def _distance(self, x_0_BNP: Tensor, images: Tensor) -> Tensor:
        size, patch = images.shape[-1], self.experiment.model.patch_size
        away = torch.ones(1, 3, size, size)
        away[..., -(size // PATCH_SHARE) :, -(size // PATCH_SHARE) :] = 0
        difference = (x_0_BNP - to_model_range(patchify(images, patch))) * patchify(away, patch)
        return difference.square().sum(dim=(1, 2))
