"""Share of clipping, AdamW and the moving average in a step of S: 64 px, mask 0.9, batch 16, bfloat16, one thread."""

import sys

import torch
from torch import nn

from benchmarks.measure import cpu_seconds, medians, not_measured, verdict, without_options
from benchmarks.train_step import make_experiment
from shared.diffusion.uvit import build_model
from shared.seeding import Streams
from shared.training.engine import Engine
from shared.training.precision import cpu_flags

SEED = 0
ROUNDS = 7
NEEDED = 0.12


def main() -> int:
    """Print the share; 0 when it is small enough."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    if not cpu_flags() & {"avx512_bf16", "amx_bf16"}:
        return not_measured("optimizer", "this CPU has neither avx512_bf16 nor AMX")
    experiment = make_experiment(0.9, 16)
    engine = Engine(experiment, build_model(experiment), Streams(SEED))
    images = torch.randint(256, (16, 3, 64, 64), dtype=torch.uint8)
    # Gradients stay from the step before, so both parts work on what they meet in training.
    parameters = list(engine.model.parameters())
    actions = {
        "step": lambda: engine.step(images),
        "clipping": lambda: nn.utils.clip_grad_norm_(parameters, experiment.optim.grad_clip, foreach=True),
        "AdamW": engine.optimizer.step,
        "average": engine.ema.update,
    }
    middle = medians(cpu_seconds(actions, ROUNDS))
    print(", ".join(f"{name} {seconds * 1000:.1f} ms" for name, seconds in middle.items()))
    share = (middle["clipping"] + middle["AdamW"] + middle["average"]) / middle["step"]
    return verdict(
        "clipping + AdamW + average, share of an S step",
        f"{share:.1%} (needs below {NEEDED:.0%})",
        reached=share < NEEDED,
    )


if __name__ == "__main__":
    sys.exit(without_options(main, __doc__))
