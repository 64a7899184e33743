"""Everything that only a GPU shows, in one call of at most nine minutes: `python -m benchmarks.device`.

Each part runs in a process of its own with a limit of its own, so that one that hangs or fails costs the others
nothing, and ends as a row of the table: bfloat16 training step and its share of the peak at three masks, what compiling
is worth, DistributedDataParallel over every GPU there, sampling, numbers equal to the CPU's, and a site's round, plain
and with DP-SGD. The parts but the last need torch, einops, numpy, PyWavelets, pydantic and safetensors only; the last
needs all of maskfed. A row that could not be measured says why. Without a GPU the status is 77, and 1 when a part is
short.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks import gpu
from benchmarks.measure import UNMEASURED, hardware, not_measured, train_flops, verdict
from benchmarks.train_step import make_experiment
from shared.diffusion.losses import draw_noise, per_image_loss
from shared.diffusion.samplers import ddim
from shared.diffusion.sampling import denoiser
from shared.diffusion.schedule import make_schedule
from shared.diffusion.uvit import build_model
from shared.experiment.config import Experiment, parse_experiment
from shared.training.compiling import has_compiler

SEED = 0
NEEDS_GPU = True
LIMIT_SECONDS = 540
STEPS = [("S", 0.0, 256), ("S", 0.5, 512), ("S", 0.9, 1024)]
"""Size, mask ratio and batch of the timed steps."""
TOLERANCE = 1e-2
EQUAL = {
    "pixels": '[model]\nsize = "T"\n[train]\nobjective = "msm"\n[mask]\nkind = "block"\nratio = 0.5\n',
    "two sequences": '[model]\nsize = "T"\nqkv_bias = true\n[data]\nwavelet = "haar"\nwavelet_tokens = "split"\n',
}
"""Networks whose loss and samples are compared with the CPU's."""


def main(arguments: Sequence[str] = ()) -> int:
    """Run all parts, or one in this process; the table, then the verdict."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=[*PARTS, "ddp-rank"], help="run this part here")
    part = parser.parse_args(arguments).part
    if part:
        return ddp_rank() if part == "ddp-rank" else PARTS[part][0]()
    if not torch.cuda.is_available():
        return not_measured("device", "no GPU here")
    print(hardware(), torch.__version__, f"{torch.cuda.device_count()} GPUs")
    rows = [(name, *run_part(name, limit)) for name, (_, limit) in PARTS.items()]
    print("| part | outcome | figure | seconds |\n| --- | --- | --- | --- |")
    outcomes = {0: "reached", UNMEASURED: "not measured"}
    for name, status, figure, seconds in rows:
        print(f"| {name} | {outcomes.get(status, 'NOT reached')} | {figure} | {seconds:.0f} |")
    short = [name for name, status, *_ in rows if status]
    text = f"{len(rows) - len(short)} of {len(rows)} parts on {torch.cuda.get_device_name()}"
    text += f", not {', '.join(short)}" if short else ""
    return verdict("device", text, reached=not short)


def run_part(name: str, limit: float) -> tuple[int, str, float]:
    """Exit status, last line and seconds of one part, in a process of its own that ends with its limit."""
    command, started = [sys.executable, "-m", "benchmarks.device", "--part", name], time.monotonic()
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=limit, cwd=Path(__file__).parent.parent, check=False
        )
    except subprocess.TimeoutExpired:
        return 1, f"no result in {limit:g} s", time.monotonic() - started
    said = done.stdout.split("\n") if done.stdout.strip() else done.stderr.split("\n")
    lines = [line for line in said if line.strip()] or [f"ended with status {done.returncode}"]
    return done.returncode, lines[-1].replace("|", "/"), time.monotonic() - started


def steps() -> int:
    """Training steps as a run has them, compiled where that is the default."""
    peak = gpu.H100_PEAK if "H100" in torch.cuda.get_device_name() else gpu.gemm_peak()
    found = []
    for size, ratio, batch in STEPS:
        experiment = make_experiment(ratio, batch, size)
        seconds = gpu.step_seconds(experiment)
        mfu = train_flops(experiment) * batch / seconds / peak
        found.append(f"{size} mask {ratio:g}: {batch / seconds:.0f} images/s, MFU {mfu:.1%}")
    return verdict("bfloat16 step", "; ".join(found), reached=True)


def compiling() -> int:
    """What compiling takes off a step."""
    if not has_compiler():
        return not_measured("compile", "no C compiler, or no headers of Python")
    size, ratio, batch = STEPS[-1]
    compiled = make_experiment(ratio, batch, size)
    eager = compiled.model_copy(update={"train": compiled.train.model_copy(update={"compile": "never"})})
    slow, fast = (gpu.step_seconds(each) for each in (eager, compiled))
    text = f"{size} mask {ratio:g}: {slow * 1e3:.1f} ms eager, {fast * 1e3:.1f} ms compiled, {slow / fast:.2f}x"
    return verdict("compile", text, reached=fast < slow)


def distributed() -> int:
    """The same step by DistributedDataParallel over all GPUs, one process each."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 1
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    command = [sys.executable, *launcher, "-m", "benchmarks.device", "--part", "ddp-rank"]
    return subprocess.run(command, check=False).returncode


def ddp_rank() -> int:
    """One process of `distributed`: the averaged gradient against that of all images in one process, and the speed."""
    is_gpu, local = torch.cuda.is_available(), int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local) if is_gpu else torch.device("cpu")
    if is_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if is_gpu else "gloo")
    rank, count = dist.get_rank(), dist.get_world_size()
    experiment = parse_experiment(EQUAL["pixels"])
    model = seeded(experiment, device)
    images, draw = batch_of(experiment, 8 * count, device)
    whole = gradient_of(model, model, experiment, images, draw)
    wrapped = DistributedDataParallel(model, [device] if is_gpu else None)
    part = slice(8 * rank, 8 * rank + 8)
    shared = gradient_of(model, wrapped, experiment, images[part], tuple(each[part] for each in draw))
    error = float((whole - shared).norm() / whole.norm())
    size, ratio, batch = STEPS[-1] if is_gpu else ("T", 0.9, 8)
    rate = count * batch / ddp_seconds(make_experiment(ratio, batch, size), device)
    dist.destroy_process_group()
    if rank:
        return 0
    text = f"{count} processes: gradient {error:.1e} from one process (needs {TOLERANCE:g}), {rate:.0f} images/s in all"
    return verdict("DistributedDataParallel", text, reached=error <= TOLERANCE)


def sampling() -> int:
    """DDIM as the paper's evaluations use it."""
    rate = gpu.sampling_speed()
    return verdict("sampling", f"S 64 px, DDIM {gpu.SAMPLING_STEPS}: {rate:.1f} images/s", reached=True)


def equality() -> int:
    """Loss and DDIM samples of small networks in float32, of the same noise, on the GPU and on the CPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {}
    for name, text in EQUAL.items():
        experiment = parse_experiment(text)
        there, here = (outcome_of(experiment, each) for each in (device, torch.device("cpu")))
        found[name] = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(there, here, strict=True))
    text = ", ".join(f"{name} {error:.1e}" for name, error in found.items())
    return verdict(
        "equal to the CPU", f"{text} relative (needs {TOLERANCE:g})", reached=max(found.values()) <= TOLERANCE
    )


def site_round() -> int:
    """`gpu --round`: needs all of maskfed."""
    try:
        return gpu.main(["--round"])
    except ImportError as error:
        return not_measured("client round", f"{error.name} is not installed")


def outcome_of(experiment: Experiment, device: torch.device) -> list[torch.Tensor]:
    """Losses of a batch, and images of ten steps of DDIM, on the CPU."""
    model, schedule = seeded(experiment, device), make_schedule("cosine", 1000)
    images, draw = batch_of(experiment, 4, device)
    side = experiment.grid_size * experiment.model.patch_size
    noise = torch.randn(11, 4, experiment.in_channels, side, side, generator=torch.Generator().manual_seed(SEED))
    with torch.no_grad():
        losses = per_image_loss(model, schedule.to(device), experiment, images, *draw)
        x_0 = ddim(
            denoiser(model, experiment), schedule, noise[0].to(device), iter(noise[1:].to(device)),
            num_steps=10, eta=1.0, prediction="eps", clip_x_0=False,
        )  # fmt: skip
    return [losses.cpu(), x_0.cpu()]


def seeded(experiment: Experiment, device: torch.device) -> nn.Module:
    """A network of seeded weights."""
    torch.manual_seed(SEED)
    return build_model(experiment).to(device)


def batch_of(experiment: Experiment, count: int, device: torch.device) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Images and a draw, the same on every device."""
    random, side = torch.Generator().manual_seed(SEED), experiment.model.image_size
    images = torch.randint(256, (count, 3, side, side), dtype=torch.uint8, generator=random)
    return images.to(device), tuple(each.to(device) for each in draw_noise(experiment, count, random))


def gradient_of(
    model: nn.Module, network: nn.Module, experiment: Experiment, images: torch.Tensor, draw: Sequence[torch.Tensor]
) -> torch.Tensor:
    """The gradient of the mean loss in one row, as `network` leaves it in `model`."""
    model.zero_grad()
    schedule = make_schedule("cosine", 1000).to(images.device)
    torch.autograd.backward(per_image_loss(network, schedule, experiment, images, *draw).mean())
    return torch.cat([each.grad.flatten() for each in model.parameters() if each.grad is not None]).clone()


def ddp_seconds(experiment: Experiment, device: torch.device, calls: int = 10) -> float:
    """Seconds of forward and backward in bfloat16, gradients averaged over the processes."""
    model = DistributedDataParallel(seeded(experiment, device), [device] if device.type == "cuda" else None)
    schedule, (images, draw) = (
        make_schedule("cosine", 1000).to(device),
        batch_of(experiment, experiment.train.batch, device),
    )
    for call in range(calls + 3):
        if call == 3:
            wait(device)
            start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16):
            loss = per_image_loss(model, schedule, experiment, images, *draw).mean()
        torch.autograd.backward(loss)
    wait(device)
    return (time.perf_counter() - start) / calls


def wait(device: torch.device) -> None:
    """Until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


PARTS: dict[str, tuple[Callable[[], int], float]] = {
    "step": (steps, 150),
    "compile": (compiling, 60),
    "ddp": (distributed, 60),
    "sampling": (sampling, 80),
    "equality": (equality, 40),
    "round": (site_round, 150),
}
"""What is run, and for how many seconds at most."""
assert sum(limit for _, limit in PARTS.values()) <= LIMIT_SECONDS


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
