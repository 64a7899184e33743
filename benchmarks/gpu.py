"""Training and sampling speed on a GPU: share of the bfloat16 peak (MFU) and images per second.

Needs torch, einops, numpy, PyWavelets, pydantic and safetensors only. Goals are those for an H100 (800 TFLOP/s dense
bfloat16); other GPUs print their MFU against their own measured 8192^3 product. `--round` measures a site's round
instead (`client_round`), which needs all of maskfed; further options are those of that module.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence

import torch

from benchmarks.measure import Action, hardware, not_measured, train_flops
from benchmarks.train_step import make_experiment
from shared.diffusion.uvit import build_model
from shared.evaluation.generate import sample_x_0
from shared.experiment.config import Experiment
from shared.seeding import Streams
from shared.training.engine import Engine

SEED = 0
ROUNDS = 20
NEEDS_GPU = True
H100_PEAK = 800e12
TRAIN_ROWS = [
    ("S", 0.0, 256, 0.5),
    ("S", 0.5, 512, 0.5),
    ("S", 0.9, 1024, 0.4),
    ("B", 0.0, 256, 0.5),
    ("B", 0.5, 512, 0.5),
]
"""Size, mask ratio, batch, MFU to reach."""
SAMPLING_BATCH, SAMPLING_STEPS, SAMPLING_GOAL = 256, 250, 60.0


def main(arguments: Sequence[str] = ()) -> int:
    """Print every row; 0 when all goals are reached, the GPU is no H100, or there is none."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--round", action="store_true", help="a site's round from a request, plain and with DP-SGD")
    options, others = parser.parse_known_args(arguments)
    if options.round:
        from benchmarks import client_round

        return client_round.main(others)
    if others:
        parser.error(f"unknown option {others[0]}")
    if not torch.cuda.is_available():
        return not_measured("gpu", "no GPU here")
    print(hardware(), torch.__version__)
    peak = gemm_peak()
    is_h100 = "H100" in torch.cuda.get_device_name()
    print(f"8192^3 bfloat16 product: {peak / 1e12:.0f} TFLOP/s")
    texts, reached = [], True
    for size, ratio, batch, goal in TRAIN_ROWS:
        experiment = make_experiment(ratio, batch, size)
        seconds = step_seconds(experiment)
        mfu = train_flops(experiment) * batch / seconds / (H100_PEAK if is_h100 else peak)
        print(
            f"train {size} mask {ratio} batch {batch}: {seconds * 1e3:.1f} ms, "
            f"{batch / seconds:.0f} images/s, MFU {mfu:.1%}"
        )
        texts.append(f"{size} mask {ratio} {mfu:.0%}" + (f" (goal {goal:.0%})" if is_h100 else ""))
        reached &= mfu >= goal
    images_per_second = sampling_speed()
    print(f"sampling S 64 px, DDIM {SAMPLING_STEPS}: {images_per_second:.1f} images/s")
    texts.append(f"sampling {images_per_second:.0f} images/s" + (f" (goal {SAMPLING_GOAL:.0f})" if is_h100 else ""))
    reached &= images_per_second >= SAMPLING_GOAL
    outcome = ("reached" if reached else "NOT reached") if is_h100 else "no goals for this GPU"
    print(f"GPU, bfloat16 MFU of train steps at 64 px: {', '.join(texts)}: {outcome}")
    return 0 if reached or not is_h100 else 1


def gemm_peak() -> float:
    """FLOP/s of a large bfloat16 product."""
    left, right = torch.randn(2, 8192, 8192, device="cuda").bfloat16()
    return 2 * 8192**3 / median_seconds(lambda: left @ right)


def step_seconds(experiment: Experiment) -> float:
    """Seconds of one training step, images on the device, as in a run that reads ahead."""
    torch.manual_seed(SEED)
    torch.compiler.reset()
    engine = Engine(experiment, build_model(experiment).cuda(), Streams(SEED))
    shape = (experiment.train.batch, 3, experiment.model.image_size, experiment.model.image_size)
    images = torch.randint(256, shape, dtype=torch.uint8, device="cuda")
    return median_seconds(lambda: engine.step(images))


def sampling_speed() -> float:
    """Images per second of DDIM on the S model, bfloat16 network, float32 solver."""
    experiment = make_experiment(0.0, 1).model_copy(
        update={"evaluation": Experiment().evaluation.model_copy(update={"steps": SAMPLING_STEPS, "sampler": "ddim"})}
    )
    torch.manual_seed(SEED)
    model = build_model(experiment).cuda().eval()
    model.compile(dynamic=False)
    warm = experiment.model_copy(update={"evaluation": experiment.evaluation.model_copy(update={"steps": 2})})
    seeds = list(range(SAMPLING_BATCH))
    sample_x_0(model, warm, seeds, "cuda", precision="bfloat16")
    torch.cuda.synchronize()
    start = time.perf_counter()
    sample_x_0(model, experiment, seeds, "cuda", precision="bfloat16")
    torch.cuda.synchronize()
    return SAMPLING_BATCH / (time.perf_counter() - start)


def median_seconds(action: Action, calls: int = 5) -> float:
    """Median over `ROUNDS` rounds of the wall time per call; each round queues `calls` of them, as a training does."""
    for _ in range(5):
        action()
    times = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            action()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
