"""What hiding 90 percent of the blocks is worth: images per second of the S model at 64 px, mask 0.9 over mask 0.

The same training step and code for both, bfloat16, one thread. Batches are chosen so that both steps have about the
same number of operations; 32 of 256 patches are visible, so operations alone allow 8.3 times.
"""

import sys

import torch

from benchmarks.measure import cpu_seconds, not_measured, paired_ratio, train_flops, verdict, without_options
from benchmarks.train_step import make_experiment, make_step
from shared.training.precision import cpu_flags

SEED = 0
ROUNDS = 5
NEEDED = 7.5
BATCHES = {0.9: 32, 0.0: 4}


def main() -> int:
    """Print the ratio; 0 when it is large enough."""
    torch.set_num_threads(1)
    if not cpu_flags() & {"avx512_bf16", "amx_bf16"}:
        return not_measured("masking", "this CPU has neither avx512_bf16 nor AMX")
    experiments = {ratio: make_experiment(ratio, batch) for ratio, batch in BATCHES.items()}
    limit = train_flops(experiments[0.0]) / train_flops(experiments[0.9])
    times = cpu_seconds({str(ratio): make_step(experiment) for ratio, experiment in experiments.items()}, ROUNDS)
    for ratio, batch in BATCHES.items():
        print(f"mask {ratio}: {batch / min(times[str(ratio)]):.2f} images/s at best, batch {batch}")
    gain = paired_ratio(times, "0.0", "0.9") * BATCHES[0.9] / BATCHES[0.0]
    text = f"{gain:.2f}x (needs {NEEDED}x, operations allow {limit:.2f}x)"
    return verdict("images/s of an S step, mask 0.9 over mask 0", text, reached=gain >= NEEDED)


if __name__ == "__main__":
    sys.exit(without_options(main, __doc__))
