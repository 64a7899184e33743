"""A site's round from a TrainRequest on a GPU, S at 64 px, plain and with DP-SGD: the CPU's numbers, and the speed.

Run by `python -m benchmarks.gpu --round`. GPUs draw other random numbers than CPUs, so for the comparison all noise is
drawn on the CPU: then the loss of a plain round, and the clipped gradient sum of a DP step, must equal the CPU's to
1e-2 in float32. Key stream and rounded noise of DP-SGD must be the CPU's to the last bit. Images per second of plain
(float32, bfloat16) and DP rounds and their ratio are printed. Needs the whole of maskfed; `--device cpu --size T` tries
the command without a GPU.
"""

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal
from unittest import mock

import torch
from torch import Tensor

from benchmarks.measure import hardware, not_measured, verdict
from benchmarks.scratch import scratch
from client.data.dataset import Dataset, open_dataset, scan
from client.home import Home
from client.privacy.clipping import clipped_gradients
from client.privacy.grid_noise import rounded_pairs
from client.privacy.randomness.keystream import BLOCK_WORDS, GPU_BLOCKS, Keystream
from client.records.data_registry import REGISTRY_VARIABLE
from client.settings import SiteConfig, SitePolicy, save_settings
from client.training.local_round import Round
from shared.data.synthetic import write_folder
from shared.diffusion import losses
from shared.diffusion.schedule import make_schedule
from shared.diffusion.uvit import build_model
from shared.experiment.config import Experiment
from shared.messages.packing import Manifest, pack
from shared.messages.training import RequestHeader, TrainRequest

SEED = 0
BATCH, TIMED_STEPS, COMPARED_STEPS, TOLERANCE = 64, 40, 2, 1e-2
NUM_IMAGES, IMAGE_SIZE = 512, 64
NUM_WORDS, DEVIATION = BLOCK_WORDS * GPU_BLOCKS + 6, 2.0**30
"""More words than a GPU makes at once; of so much noise float64 leaves about a hundred numbers to exact arithmetic."""


def main(arguments: Sequence[str]) -> int:
    """Print losses and speeds; 0 when the losses agree, or where there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu --round", description=__doc__)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--size", default="S")
    parser.add_argument("--steps", type=int, default=TIMED_STEPS)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        return not_measured("client round", "no GPU here")
    print(hardware(), torch.__version__)
    with scratch() as folder:
        home, settings = make_site(folder)
        data, site = open_dataset(home, IMAGE_SIZE), with_device(settings, options.device)
        there, here = (round_loss(options.size, data, home, each) for each in (site, with_device(settings, "cpu")))
        theirs, ours = (clipped_sum(options.size, data, device) for device in (options.device, "cpu"))
        difference = float((theirs - ours).norm() / ours.norm())
        is_same = has_same_noise(options.device)
        plain, half, private = (
            images_per_second(make_request(options.size, options.steps, **kind), data, home, site)
            for kind in ({}, {"precision": "bfloat16"}, {"is_private": True})
        )
    text = (
        f"loss {there:.4f} on {options.device}, {here:.4f} on the CPU, DP gradients differ by {difference:.1e} (needs "
        f"{TOLERANCE:g} relative), DP noise of {'the same' if is_same else 'OTHER'} bits; plain {plain:.0f} images/s "
        f"({half:.0f} in bfloat16), DP {private:.0f} images/s, ratio {plain / private:.2f}"
    )
    is_near = abs(there - here) <= TOLERANCE * here and difference <= TOLERANCE
    return verdict("client round", text, reached=is_near and is_same)


def make_request(
    size: str, steps: int, *, is_private: bool = False, precision: Literal["float32", "bfloat16"] = "float32"
) -> TrainRequest:
    """One round of `steps` steps from seeded weights."""
    sections = {
        "train": {"batch": BATCH, "compile": "never"},
        "model": {"size": size, "image_size": IMAGE_SIZE},
        "data": {"horizontal_flip": False},
        "federation": {"local_steps": steps},
        "privacy": {
            "mechanism": "dp-sgd" if is_private else "none",
            "sample_rate": BATCH / NUM_IMAGES,
            "expected_batch": BATCH,
        },
    }
    experiment = Experiment.model_validate(sections)
    torch.manual_seed(SEED)
    tensors = {name: tensor.detach().numpy() for name, tensor in build_model(experiment).named_parameters()}
    manifest = Manifest.of(tensors)
    header = RequestHeader(run="run", server_round=1, experiment=experiment, precision=precision, manifest=manifest)
    return TrainRequest(header, pack(tensors, manifest))


def round_loss(size: str, data: Dataset, home: Home, site: SiteConfig) -> float:
    """Mean loss of a short plain round; its noise is the same on every device."""
    with mock.patch("shared.training.engine.draw_noise", draw_on_cpu):
        _, scalars = Round(make_request(size, COMPARED_STEPS), None, data, home, site).run()
    return scalars["loss"]


def clipped_sum(size: str, data: Dataset, device: str) -> Tensor:
    """The sum of clipped gradients of a batch on seeded weights and noise, all trained tensors in a row, on the CPU."""
    experiment = make_request(size, 1, is_private=True).header.experiment
    torch.manual_seed(SEED)
    model = build_model(experiment).to(device).train()
    schedule = make_schedule(experiment.diffusion.schedule, experiment.diffusion.timesteps).to(device)
    images = data.images.batch(data.train[:BATCH]).to(device)
    draw = draw_on_cpu(experiment, BATCH, torch.Generator(device).manual_seed(SEED))
    _, sums = clipped_gradients(
        model, lambda: losses.per_image_loss(model, schedule, experiment, images, *draw), bound=1.0
    )
    return torch.cat([sums[parameter].flatten().cpu() for parameter in model.parameters()])


def has_same_noise(device: str) -> bool:
    """Whether random words and rounded Gaussian numbers of one key are those of the CPU, to the last bit."""
    words = [Keystream(bytes(range(32)), each).bits(NUM_WORDS) for each in (device, "cpu")]
    noise = [rounded_pairs(*each.view(2, -1), DEVIATION) for each in words]
    return all(torch.equal(there.cpu(), here) for there, here in (words, noise))


def draw_on_cpu(experiment: Experiment, batch: int, generator: torch.Generator) -> losses.Draw:
    """The noise that a CPU draws from the generator's seed, on the generator's device."""
    same = torch.Generator().manual_seed(generator.initial_seed())
    return losses.Draw(*(each.to(generator.device) for each in losses.draw_noise(experiment, batch, same)))


def images_per_second(request: TrainRequest, data: Dataset, home: Home, settings: SiteConfig) -> float:
    """Expected images over wall seconds of a round's training; one short round warms up.

    A round ends with the update on the CPU, so the GPU is done when the clock stops.
    """
    federation = request.header.experiment.federation
    short = request.header.experiment.model_copy(
        update={"federation": federation.model_copy(update={"local_steps": 2})}
    )
    warm = TrainRequest(request.header.model_copy(update={"experiment": short}), request.weights)
    Round(warm, None, data, home, settings).run()
    training = Round(request, None, data, home, settings)
    if training.device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    training.run()
    return federation.local_steps * BATCH / (time.perf_counter() - start)


def make_site(folder: Path) -> tuple[Home, SiteConfig]:
    """A scanned site of 512 synthetic images, none held out."""
    os.environ[REGISTRY_VARIABLE] = str(folder / "registry")
    home = Home(folder / "home")
    write_folder(folder / "photos", num_images=NUM_IMAGES, size=IMAGE_SIZE, seed=SEED)
    settings = SiteConfig(
        alias="site0",
        address="127.0.0.1:1",
        data=str(folder / "photos"),
        image_size=IMAGE_SIZE,
        held_out_ratio=0.0,
        head_file=str(folder / "head" / "ledger.json"),
        policy=SitePolicy(),
    )
    save_settings(home, settings)
    scan(home, settings)
    return home, settings


def with_device(settings: SiteConfig, device: str) -> SiteConfig:
    """The same site on another device."""
    return SiteConfig.model_validate({**settings.model_dump(), "device": device})
