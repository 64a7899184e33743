"""What a model needs, by its size and that of its images: bytes, memory, minutes; `--write` puts it into the docs.

Measured pieces, put together. Values of each model and what a backward pass keeps of one image are counted on a device
that computes nothing; attention that is not kept whole, as on a GPU, takes less. Memory of processes is what
`deploy.processes.memory` allows them. Images a second of an H100 are those of the stored row `gpu --round` for model S
at 64 pixels, in bfloat16 plain and in float32 with DP; for the others they are scaled by the operations of a training
step, which nobody has measured there.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from deploy.processes.memory import NEEDS, UNITS, unit_bytes
from shared.diffusion.losses import draw_noise, per_image_loss
from shared.diffusion.schedule import make_schedule
from shared.diffusion.uvit import build_model
from shared.experiment.config import Experiment
from shared.planning.probe import num_values
from shared.planning.workload import BYTES
from shared.seeding import generator
from shared.training.flops import train_flops

ROOT = Path(__file__).parent.parent
DOCUMENT, ROWS = ROOT / "deploy" / "README.md", ROOT / "benchmarks" / "BENCHMARKS.md"
BEGIN, END = "<!-- sizing -->", "<!-- /sizing -->"
SHAPES = (
    ("T", 32, 4),
    ("T", 64, 4),
    ("S", 64, 4),
    ("S", 128, 8),
    ("B", 64, 4),
    ("B", 128, 8),
    ("L", 64, 4),
    ("L", 128, 8),
)
"""Size, pixels and patch of the rows."""
IMAGES_A_ROUND, BATCH = 100_000, 16
_RATE = re.compile(r"plain (\d+) images/s \((\d+) in bfloat16\), DP (\d+) images/s")
OPTIMIZER_COPIES = 5
"""Weights, gradients, both moments and the average, float32."""


def tell(arguments: Sequence[str] = ()) -> int:
    """Print the table, or write it into deploy/README.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write it into deploy/README.md")
    options = parser.parse_args(arguments)
    found = "\n".join(table())
    if options.write:
        text = DOCUMENT.read_text(encoding="utf-8")
        before, _, rest = text.partition(BEGIN)
        DOCUMENT.write_text(f"{before}{BEGIN}\n{found}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    sys.stdout.write(f"{found}\n")
    return 0


def table(shapes: Sequence[tuple[str, int, int]] = SHAPES) -> Iterator[str]:
    """The lines of the table."""
    plain, private = stored_rates()
    anchor = train_flops(experiment("S", 64, 4))
    yield (
        "| model | pixels | values | MB a round, float32 / bfloat16 | coordinator, GB | site's processes, GB | GPU, GB "
        f"at batch {BATCH} | H100, minutes for {IMAGES_A_ROUND:,} images: plain / DP |"
    )
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for size, pixels, patch in shapes:
        plan = experiment(size, pixels, patch)
        values, share = num_values(plan)[0], train_flops(plan) / anchor
        bytes_moved = [f"{2 * values * BYTES[kind] / 1e6:.0f}" for kind in ("float32", "bfloat16")]
        gpu = OPTIMIZER_COPIES * 4 * values + BATCH * bytes_kept(plan)
        server = unit_bytes(UNITS["maskfed-server"], values)
        site = unit_bytes(UNITS["maskfed-node"], values) + NEEDS["clientapp"].of(values)
        minutes = [f"{IMAGES_A_ROUND * share / rate / 60:.1f}" for rate in (plain, private)]
        yield (
            f"| {size} | {pixels} (patch {patch}) | {values / 1e6:.1f} M | {' / '.join(bytes_moved)} | "
            f"{server / 1e9:.1f} | {site / 1e9:.1f} | {gpu / 1e9:.1f} | {' / '.join(minutes)} |"
        )


def experiment(size: str, pixels: int, patch: int) -> Experiment:
    """A federated fine-tuning of a model, without a mask."""
    return Experiment.model_validate({"model": {"size": size, "image_size": pixels, "patch_size": patch}})


def stored_rates() -> tuple[float, float]:
    """Images a second of model S at 64 pixels: in bfloat16 plain, in float32 with DP."""
    found = _RATE.search(ROWS.read_text(encoding="utf-8"))
    assert found is not None, "the row `gpu --round` has another form"
    return float(found[2]), float(found[3])


def bytes_kept(plan: Experiment, device: str = "meta") -> int:
    """What the backward pass of one image's loss keeps, weights aside, float32."""
    with torch.device(device):
        model = build_model(plan)
    weights = {id(parameter) for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if id(tensor) not in weights and tensor.device.type == device:
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage.nbytes()
        alive.append(tensor)
        return tensor

    alive: list[Tensor] = []
    side = plan.model.image_size
    images = torch.empty(1, 3, side, side, dtype=torch.uint8, device=device)
    schedule = make_schedule(plan.diffusion.schedule, plan.diffusion.timesteps).to(device)
    draw = [each.to(device) for each in draw_noise(plan, 1, generator(0))]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        per_image_loss(model, schedule, plan, images, *draw)
    return sum(kept.values())


if __name__ == "__main__":
    sys.exit(tell(sys.argv[1:]))
