"""What the private stages of the demo bring: `python -m benchmarks.private_gain [--scale 10] [--seed 1]`.

In one process, by the parts that commands and sites use: public training from the shipped model; on from there with the
same number of images on public images as they are, on public images aligned with the sites' mean images (asked through
the sites' own handler and charged to their ledgers), on ones aligned with mean images without noise, and on the private
images themselves, which is the ceiling. The demo's round of DP-SGD is left out: the demo itself shows what it adds.

`--scale 10` takes ten times the persons and ten times the training. The loss is that of averaged weights on held-out
persons, the same images and noise for all. Epsilon is what the ledgers say at the end.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from flwr.app import RecordDict

from benchmarks.measure import verdict, without_options
from benchmarks.privacy_attacks.question_site import spent
from benchmarks.scratch import scratch
from client.answers.statistics.mean_image import answer_mean_image
from client.data.dataset import open_dataset, scan
from client.home import Home
from client.private_files import write_private
from client.settings import SiteConfig, SitePolicy, save_settings
from server.alignment.aligned_images import align_images
from server.alignment.mean_images import MeanImage, mean_of
from server.evaluation.measures.held_out_loss import HeldOutLoss, held_out_loss, interval_of_difference
from server.training.train import train
from shared.data.image_cache import open_images
from shared.data.synthetic import write_folder
from shared.experiment.config import Experiment, load_experiment
from shared.experiment.recipes import find_experiment
from shared.messages.envelope import header_record, read_array, read_header, validated
from shared.messages.statistics import PIXEL_SUM, MeanImageAnswer, MeanImageQuery

SHIPPED_MODEL = Path(__file__).parents[1] / "server" / "models" / "synthetic32-T-msm"
NUM_SITES, SITE_IMAGES, PUBLIC_IMAGES = 3, 4500, 6000
START_STEPS, FURTHER_STEPS = 128, 192
HELD_OUT = "synthetic:heldout3:1200"
LOSS_IMAGES = 300
"""About one of each held-out person."""
ROUNDS = 1
SEED = 0


def main() -> int:
    """Print a line for each arm; 0 when the private model's loss is below public-only's by more than its interval."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=int, default=1, help="times the persons and the steps")
    parser.add_argument("--seed", type=int, default=SEED)
    options = parser.parse_args()
    with scratch() as folder:
        losses, epsilon = measure(folder, options.scale, options.seed)
    own = losses["private"]
    for name, loss in losses.items():
        low, high = interval_of_difference(loss, own) if loss is not own else (0.0, 0.0)
        print(f"{name}: {loss.mean:.5f}, above private by {low:+.5f} to {high:+.5f}", flush=True)
    low, high = interval_of_difference(losses["public only"], own)
    gap = losses["public only"].mean - losses["private images"].mean
    share = (losses["public only"].mean - own.mean) / gap
    told = ", ".join(f"{name} {loss.mean:.4f}" for name, loss in losses.items())
    text = (
        f"scale {options.scale}: {told}; epsilon {epsilon:.2f} per person; public only above private by {low:+.4f} to "
        f"{high:+.4f} (95 %), {share:.0%} of the gap to private images"
    )
    return verdict("private gain", text, reached=low > 0)


def measure(folder: Path, scale: int, seed: int) -> tuple[dict[str, HeldOutLoss], float]:
    """The loss of each arm, and the largest epsilon that a site's ledger says."""
    plan = load_experiment(find_experiment("demo-private32-T"))
    sites = [new_site(folder, number, scale) for number in range(NUM_SITES)]
    public = open_images(f"synthetic:public:{PUBLIC_IMAGES}", plan.model.image_size)
    noisy = [ask(home, plan, number) for number, home in enumerate(sites)]
    exact = [without_noise(home, number) for number, home in enumerate(sites)]
    align_images(public, noisy, [], folder / "aligned")
    align_images(public, exact, [], folder / "exact")
    start = trained(folder / "start", SHIPPED_MODEL, f"synthetic:public:{PUBLIC_IMAGES}", scale * START_STEPS, seed)
    data: Mapping[str, Path | str] = {
        "public only": f"synthetic:public:{PUBLIC_IMAGES}",
        "private": folder / "aligned",
        "without noise": folder / "exact",
        "private images": folder / "photos",
    }
    losses = {"start": held_out_loss(start, HELD_OUT, LOSS_IMAGES)}
    for name, images in data.items():
        run = trained(folder / name.replace(" ", "-"), start, images, scale * FURTHER_STEPS, seed)
        losses[name] = held_out_loss(run, HELD_OUT, LOSS_IMAGES)
        print(f"{name}: {losses[name].mean:.5f}", flush=True)
    return losses, max(spent(home) for home in sites)


def new_site(folder: Path, number: int, scale: int) -> Home:
    """A scanned site with the default policy, but for approvals."""
    photos, home = folder / "photos" / f"site{number}", Home(folder / f"home{number}")
    write_folder(photos, scale * SITE_IMAGES, 32, SEED, site=f"site{number}")
    policy = SitePolicy(tasks=("train", "mean_image"), experiments="any", unit="person")
    settings = SiteConfig(
        alias=f"site{number}", address="127.0.0.1:1", data=str(photos), image_size=32, held_out_ratio=0.0,
        head_file=str(folder / "heads" / f"{number}.json"), policy=policy,
    )  # fmt: skip
    save_settings(home, settings)
    write_private(home.data_key, number.to_bytes(32))
    scan(home, settings)
    return home


def ask(home: Home, plan: Experiment, number: int) -> MeanImage:
    """The site's mean image by its own handler, which charges it."""
    content = RecordDict({"header": header_record(MeanImageQuery(run="gain", experiment=plan))})
    reply = answer_mean_image(content, home)
    answer = validated(MeanImageAnswer, read_header(reply))
    if answer.status != "released":
        raise RuntimeError(f"site {number}: {answer.reason}")
    pixels = read_array(reply, PIXEL_SUM, 3 * 32 * 32)
    return mean_of(pixels, answer.num_units, answer.norm, plan.privacy.mean_image_noise, f"site{number}")


def without_noise(home: Home, number: int) -> MeanImage:
    """What no site would tell: the exact mean."""
    data = open_dataset(home, 32)
    total = sum(data.images.batch(rows).numpy().astype(np.float64).sum(0) for rows in np.array_split(data.train, 16))
    return MeanImage(f"site{number}", np.asarray(total) / len(data.train) * (2 / 255) - 1, 0.0)


def trained(out: Path, init: Path, data: Path | str, steps: int, seed: int) -> Path:
    """A public stage of the demo."""
    overrides = [f"train.steps={steps}", f"train.seed={seed}"]
    experiment = load_experiment(find_experiment("demo-private32-T-public"), overrides)
    return train(experiment, Path(data), out, init).path


if __name__ == "__main__":
    sys.exit(without_options(main, __doc__))
