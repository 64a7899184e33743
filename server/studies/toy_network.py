# ruff: noqa: N803, N806 - shape suffixes
"""The network of the paper's Figure 2: masked and denoising score matching on single coordinates, and sampling.

Shapes: B points, N coordinates, V visible coordinates, D width.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from server.studies.stored_toys import ToyName
from server.studies.toy_shapes import draw
from shared.diffusion.masks import choose_subsets
from shared.diffusion.samplers import ddim
from shared.diffusion.schedule import Schedule, q_sample
from shared.seeding import derive_seed, generator

BATCH_POINTS = 256
SAMPLING_STEPS = 50
_WIDTH = 64
_FREQUENCIES = 16
_LR = 4e-3


class CoordinateMlp(nn.Module):
    """A small network of coordinates with the interface of the U-ViT: tokens (B, V, 1), t (B,), ids (B, V).

    A coordinate is predicted from itself, its position, the time, and the mean of what the other visible coordinates
    say. That last path starts at random like every other layer: nothing makes a network that was shown single
    coordinates draw them independently.
    """

    def __init__(self, num_coordinates: int, width: int = _WIDTH) -> None:
        super().__init__()
        self.frequency: Tensor
        self.register_buffer("frequency", torch.randn(_FREQUENCIES) * 4)
        features = 1 + 2 * _FREQUENCIES
        self.position, self.said_position = nn.Embedding(num_coordinates, width), nn.Embedding(num_coordinates, width)
        self.value, self.said_value = nn.Linear(features, width), nn.Linear(features, width)
        self.time = nn.Linear(2 * _FREQUENCIES, width)
        self.said, self.heard = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.body = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.output = nn.Linear(width, 1)

    def forward(self, x_BV1: Tensor, t_B: Tensor, ids_BV: Tensor) -> Tensor:
        """(B, V, 1) noised coordinates to (B, V, 1) predictions of eps."""
        quarters = torch.arange(_FREQUENCIES, device=t_B.device)
        angle_BF = t_B[:, None] / 1000 * math.pi * 2 ** (quarters / 4)
        time_B1D = self.time(torch.cat([angle_BF.sin(), angle_BF.cos()], -1))[:, None]
        wave = x_BV1 * self.frequency
        features = torch.cat([x_BV1, wave.sin(), wave.cos()], -1)
        said_BVD = self.said(F.silu(self.said_value(features) + self.said_position(ids_BV) + time_B1D))
        others = max(1, ids_BV.shape[1] - 1)
        heard_BVD = self.heard((said_BVD.sum(1, keepdim=True) - said_BVD) / others)
        hidden = self.value(features) + self.position(ids_BV) + time_B1D + heard_BVD
        return self.output(self.body(hidden))  # type: ignore[no-any-return]


def train(model: CoordinateMlp, schedule: Schedule, name: ToyName, visible: int, steps: int, seed: int) -> None:
    """Minimise Eq. 4 over subsets of `visible` coordinates; with all coordinates this is Eq. 1."""
    optimizer = torch.optim.AdamW(model.parameters(), _LR, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    for step, x_0_BN, stream in _batches(name, steps, seed):
        optimizer.param_groups[0]["lr"] = _LR * min(1.0, 2 - 2 * step / steps)
        ids_BV = choose_subsets(x_0_BN.shape[1], visible, len(x_0_BN), stream)
        x_0_BV1 = x_0_BN.gather(1, ids_BV)[..., None]
        t_B = torch.randint(schedule.timesteps, (len(x_0_BN),), generator=stream)
        eps_BV1 = torch.randn(x_0_BV1.shape, generator=stream)
        loss = (model(q_sample(schedule, x_0_BV1, t_B, eps_BV1), t_B, ids_BV) - eps_BV1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def draw_samples(model: CoordinateMlp, schedule: Schedule, count: int, seed: int) -> Tensor:
    """(count, N) points by DDIM with eta = 1, every coordinate visible."""
    num_coordinates, stream = model.position.num_embeddings, generator(derive_seed(seed, "samples"))

    def noise() -> Iterator[Tensor]:
        while True:
            yield torch.randn(count, num_coordinates, generator=stream)

    def denoise(x_BN: Tensor, t: int) -> Tensor:
        ids_BN = torch.arange(num_coordinates).expand(len(x_BN), -1)
        return model(x_BN[..., None], torch.full((len(x_BN),), t), ids_BN)[..., 0]  # type: ignore[no-any-return]

    return ddim(
        denoise, schedule, next(noise()), noise(), num_steps=SAMPLING_STEPS, eta=1.0, prediction="eps", clip_x_0=False
    )


def new_model(num_coordinates: int, seed: int) -> CoordinateMlp:
    """A network whose start depends on the seed only."""
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(generator(derive_seed(seed, "weights")).get_state())
        return CoordinateMlp(num_coordinates)


def _batches(name: ToyName, steps: int, seed: int) -> Iterator[tuple[int, Tensor, torch.Generator]]:
    stream = generator(seed)
    for step in range(steps):
        yield step, draw(name, BATCH_POINTS, stream), stream
