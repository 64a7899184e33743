"""A site's round from a TrainRequest on a GPU, S at 64 px, plain and with DP-SGD: same loss as the CPU, and the speed.

The loss on the same images and noise must equal the CPU's to 1e-2 in float32 (generators of GPUs draw other numbers, so
the noise comes from the CPU's); images per second of plain and DP rounds and their ratio are printed. Needs torch,
Opacus and flwr. `--device cpu --size T` tries the command without a GPU.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.measure import hardware, verdict
from client.dataset import Dataset, open_dataset, scan
from client.settings import Home, SiteConfig, SitePolicy, save_settings
from client.trainer import Round
from shared.config import Experiment
from shared.losses import draw_noise, per_image_loss
from shared.messages import Manifest, RequestHeader, TrainRequest, pack
from shared.schedule import make_schedule
from shared.synthetic import write_folder
from shared.uvit import build_model

SEED = 0
ROUNDS = 1
NEEDS_GPU = True
BATCH, TIMED_STEPS, TOLERANCE = 64, 40, 1e-2
NUM_IMAGES, IMAGE_SIZE = 512, 64


def main(arguments: Sequence[str] = ()) -> int:
    """Print losses and speeds; 0 when the losses agree, or where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--size", default="S")
    parser.add_argument("--steps", type=int, default=TIMED_STEPS)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("client round: not measured: no GPU here")
        return 0
    print(hardware(), torch.__version__)
    with tempfile.TemporaryDirectory() as folder:
        home, settings = make_site(Path(folder).resolve())
        data = open_dataset(home, IMAGE_SIZE)
        there, here = (loss_of(options.size, data, device) for device in (options.device, "cpu"))
        site = with_device(settings, options.device)
        plain = images_per_second(make_request(options.size, options.steps), data, home, site)
        private = images_per_second(make_request(options.size, options.steps, is_private=True), data, home, site)
    text = (
        f"loss {there:.4f} on {options.device}, {here:.4f} on the CPU (needs {TOLERANCE:g} relative); "
        f"plain {plain:.0f} images/s, DP {private:.0f} images/s, ratio {plain / private:.2f}"
    )
    return verdict("client round", text, reached=abs(there - here) <= TOLERANCE * here)


def make_request(size: str, steps: int, *, is_private: bool = False) -> TrainRequest:
    """One float32 round of `steps` steps from seeded weights."""
    sections = {
        "train": {"batch": BATCH, "compile": "never"},
        "model": {"size": size, "image_size": IMAGE_SIZE},
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
    header = RequestHeader(run="run", server_round=1, experiment=experiment, precision="float32", manifest=manifest)
    return TrainRequest(header, pack(tensors, manifest))


def loss_of(size: str, data: Dataset, device: str) -> float:
    """Mean loss of a batch on seeded weights and noise."""
    experiment = make_request(size, 1).header.experiment
    torch.manual_seed(SEED)
    model = build_model(experiment).to(device)
    schedule = make_schedule(experiment.diffusion.schedule, experiment.diffusion.timesteps).to(device)
    draw = (each.to(device) for each in draw_noise(experiment, BATCH, torch.Generator().manual_seed(SEED)))
    with torch.no_grad():
        images = data.images.batch(data.train[:BATCH]).to(device)
        return float(per_image_loss(model, schedule, experiment, images, *draw).mean())


def images_per_second(request: TrainRequest, data: Dataset, home: Home, settings: SiteConfig) -> float:
    """Expected images over wall seconds of a round, model building and copies included; one short round warms up."""
    federation = request.header.experiment.federation
    short = request.header.experiment.model_copy(
        update={"federation": federation.model_copy(update={"local_steps": 2})}
    )
    warm = TrainRequest(request.header.model_copy(update={"experiment": short}), request.weights)
    Round(warm, None, data, home, settings).run()
    training = Round(request, None, data, home, settings)
    start = time.perf_counter()
    training.run()
    return federation.local_steps * BATCH / (time.perf_counter() - start)


def make_site(folder: Path) -> tuple[Home, SiteConfig]:
    """A scanned site of 512 synthetic images, none held out."""
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
