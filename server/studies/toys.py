# ruff: noqa: N803, N806 - shape suffixes
"""The paper's Figure 2 in seconds: learn the marginals of a toy distribution first, then the joint distribution.

A point of a Swiss roll (2 coordinates) or a rose (3) is a sequence of coordinates, each a token with its position.
Masked score matching shows the network one coordinate of the roll, or two of the rose, and so teaches it all marginals
of that size; sampled without a mask, it draws from a marginal proxy that covers the data. Denoising score matching then
starts from there, and is compared with the same number of steps from scratch.

Shapes: B points, N coordinates, V visible coordinates, D width.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from shared.diffusion.masks import choose_subsets
from shared.diffusion.samplers import ddim
from shared.diffusion.schedule import Schedule, make_schedule, q_sample
from shared.seeding import derive_seed, generator

ToyName = Literal["swiss-roll", "rose"]
VISIBLE: dict[ToyName, int] = {"swiss-roll": 1, "rose": 2}
"""Coordinates that masked score matching shows: single ones of the roll, all pairs of the rose."""
FINETUNE_STEPS: dict[ToyName, int] = {"swiss-roll": 200, "rose": 40}
"""Denoising steps after which the figure compares both starts: few, the roll's shape just shows."""

_BATCH_POINTS = 512
_WIDTH = 128
_FREQUENCIES = 16
_LR_MSM, _LR_DSM = 4e-3, 1.5e-3
_SAMPLING_STEPS = 50


@dataclass(frozen=True)
class ToyResult:
    """What one toy run gives; every distance is a sliced Wasserstein distance to fresh data."""

    name: ToyName
    seed: int
    pretrain_steps: int
    finetune_steps: int
    distance_proxy: float
    """Masked score matching only."""
    distance_finetuned: float
    """Then `finetune_steps` of denoising score matching."""
    distance_scratch: float
    """The same denoising steps from a random start."""
    distance_floor: float
    """Between two independent draws of the data: nothing can be expected to be lower."""
    seconds: float


class CoordinateMlp(nn.Module):
    """A small network of coordinates with the interface of the U-ViT: tokens (B, V, 1), t (B,), ids (B, V).

    A coordinate is predicted from itself, its position, the time, and the mean of what the other visible coordinates
    say. That last path starts at zero, so that a network which was only shown single coordinates draws them
    independently: the product of its marginals, the proxy of Figure 2.
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
        nn.init.zeros_(self.heard.weight)
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


def swiss_roll(count: int, stream: torch.Generator) -> Tensor:
    """(count, 2) points on one and a half turns of a spiral, within about [-1, 1]."""
    angle = 1.5 * math.pi * (1 + 2 * torch.rand(count, generator=stream))
    points = torch.stack([angle * angle.cos(), angle * angle.sin()], 1) / (4.8 * math.pi)
    return points + 0.01 * torch.randn(count, 2, generator=stream)


def rose(count: int, stream: torch.Generator) -> Tensor:
    """(count, 3) points on the petals of a rose, within about [-1, 1].

    The surface is Paul Nylander's parametric rose (bugman123.com): petals wind up a spiral and open with it.
    """
    along = torch.rand(count, generator=stream).sqrt()
    angle = math.pi * (17 * torch.rand(count, generator=stream) - 2)
    tilt = math.pi / 2 * (-angle / (8 * math.pi)).exp()
    edge = 1 - 0.5 * (1.25 * (1 - (3.6 * angle).remainder(2 * math.pi) / math.pi).square() - 0.25).square()
    bend = 1.95653 * along.square() * (1.27689 * along - 1).square() * tilt.sin()
    radius = edge * (along * tilt.sin() + bend * tilt.cos())
    height = edge * (along * tilt.cos() - bend * tilt.sin())
    return torch.stack([radius * angle.sin(), radius * angle.cos(), 1.3 * height - 0.27], 1)


def sliced_wasserstein(x_BN: Tensor, y_BN: Tensor, num_directions: int = 64) -> float:
    """Sliced 2-Wasserstein distance of two point clouds of equal size (Bonneel et al. 2015), over fixed directions.

    The root of the mean, over directions on the sphere, of the squared transport cost between the sorted projections.
    """
    directions = F.normalize(torch.randn(x_BN.shape[1], num_directions, generator=generator(0)), dim=0)
    cost = ((x_BN @ directions).sort(0).values - (y_BN @ directions).sort(0).values).square().mean()
    return float(cost.sqrt())


def run_toy(
    name: ToyName,
    out: Path,
    *,
    seed: int = 0,
    pretrain_steps: int = 1000,
    finetune_steps: int | None = None,
    num_samples: int = 4000,
) -> ToyResult:
    """Masked score matching, denoising score matching from there and from scratch; the figure and the distances.

    Args:
        name: which distribution.
        out: folder that gets `<name>.png` and `<name>.json`; made if missing.
        seed: of everything.
        pretrain_steps: steps of masked score matching.
        finetune_steps: steps of denoising score matching, the same for both starts; default: `FINETUNE_STEPS`.
        num_samples: points drawn for the distances and the figure.

    Returns:
        Distances and settings, as written to `<name>.json`.
    """
    import json

    started, steps = time.perf_counter(), FINETUNE_STEPS[name] if finetune_steps is None else finetune_steps
    data, held_out = (
        _points(name, num_samples, generator(derive_seed(seed, name, part))) for part in ("data", "held out")
    )
    schedule = make_schedule("linear", 1000)
    model = _new_model(data.shape[1], seed)
    train(model, schedule, name, VISIBLE[name], pretrain_steps, derive_seed(seed, "msm"))
    clouds = {"marginal proxy": draw_samples(model, schedule, num_samples, seed)}
    train(model, schedule, name, data.shape[1], steps, derive_seed(seed, "dsm"))
    clouds["fine-tuned"] = draw_samples(model, schedule, num_samples, seed)
    scratch = _new_model(data.shape[1], seed)
    train(scratch, schedule, name, data.shape[1], steps, derive_seed(seed, "dsm"))
    clouds["from scratch"] = draw_samples(scratch, schedule, num_samples, seed)
    proxy, finetuned, scratch_distance, floor = (sliced_wasserstein(x, held_out) for x in (*clouds.values(), data))
    result = ToyResult(
        name=name,
        seed=seed,
        pretrain_steps=pretrain_steps,
        finetune_steps=steps,
        distance_proxy=proxy,
        distance_finetuned=finetuned,
        distance_scratch=scratch_distance,
        distance_floor=floor,
        seconds=round(time.perf_counter() - started, 1),
    )
    out.mkdir(parents=True, exist_ok=True)
    _plot({"data": data} | clouds, result, out / f"{name}.png")
    (out / f"{name}.json").write_text(json.dumps(vars(result), indent=2) + "\n", encoding="utf-8")
    return result


def train(model: CoordinateMlp, schedule: Schedule, name: ToyName, visible: int, steps: int, seed: int) -> None:
    """Minimise Eq. 4 over subsets of `visible` coordinates; with all coordinates this is Eq. 1."""
    lr = _LR_DSM if visible == model.position.num_embeddings else _LR_MSM
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    for step, x_0_BN, stream in _batches(name, steps, seed):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, 2 - 2 * step / steps)
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
        denoise, schedule, next(noise()), noise(), num_steps=_SAMPLING_STEPS, eta=1.0, prediction="eps", clip_x_0=False
    )


def _points(name: ToyName, count: int, stream: torch.Generator) -> Tensor:
    return swiss_roll(count, stream) if name == "swiss-roll" else rose(count, stream)


def _batches(name: ToyName, steps: int, seed: int) -> Iterator[tuple[int, Tensor, torch.Generator]]:
    stream = generator(seed)
    for step in range(steps):
        yield step, _points(name, _BATCH_POINTS, stream), stream


def _new_model(num_coordinates: int, seed: int) -> CoordinateMlp:
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(generator(derive_seed(seed, "weights")).get_state())
        return CoordinateMlp(num_coordinates)


def _plot(clouds: dict[str, Tensor], result: ToyResult, path: Path) -> None:
    from matplotlib.figure import Figure

    distances = [result.distance_floor, result.distance_proxy, result.distance_finetuned, result.distance_scratch]
    steps = [0, result.pretrain_steps, result.finetune_steps, result.finetune_steps]
    figure = Figure(figsize=(14, 3.8), layout="constrained")
    for place, ((title, points), distance, count) in enumerate(zip(clouds.items(), distances, steps, strict=True), 1):
        is_solid = points.shape[1] == 3
        axes: Any = figure.add_subplot(1, 4, place, projection="3d" if is_solid else None)
        axes.scatter(
            *points.T.numpy(), s=1, c=points[:, -1].numpy(), cmap="magma" if is_solid else "viridis", vmin=-1, vmax=1
        )
        for set_limits in (axes.set_xlim, axes.set_ylim, *([axes.set_zlim] if is_solid else [])):
            set_limits(-1.2, 1.2)
        axes.set_title(f"{title}{f', {count} steps' if count else ''}\ndistance {distance:.3f}")
    figure.savefig(path, dpi=110)
