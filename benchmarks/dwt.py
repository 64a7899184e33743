"""Haar transform of 256 px images against PyWavelets called per image, as a data set would call it; one thread.

Eager is the function that training calls; compiled is its Haar part through torch.compile, where a compiler is.
"""

import shutil
import sys
from collections.abc import Callable

import numpy as np
import pywt
import torch
from numpy.typing import NDArray

from benchmarks.measure import Action, cpu_seconds, medians, paired_ratio, verdict, without_options
from shared.diffusion.dwt import dwt, haar

SEED = 0
ROUNDS = 15
BATCH = 32
NEEDED_EAGER, NEEDED_COMPILED = 2.0, 4.0


def main() -> int:
    """Print both ratios; 0 when they are large enough."""
    torch.set_num_threads(1)
    x = torch.rand(BATCH, 3, 256, 256, generator=torch.Generator().manual_seed(SEED)) * 2 - 1
    images = list(x.numpy())
    ours: dict[str, Callable[[], torch.Tensor]] = {"eager": lambda: dwt(x, "haar")}
    if shutil.which("c++") or shutil.which("g++"):
        compiled = torch.compile(haar, fullgraph=True, dynamic=False)
        ours["compiled"] = lambda: compiled(x)
    reference = torch.from_numpy(np.stack([_by_pywt(image) for image in images])) / 2
    error = max(float((transform() - reference).abs().max()) for transform in ours.values())
    actions: dict[str, Action] = {"PyWavelets": lambda: [_by_pywt(image) for image in images], **ours}
    times = cpu_seconds(actions, ROUNDS, warm_up=3)
    print(", ".join(f"{name} {1000 * seconds / BATCH:.3f} ms/image" for name, seconds in medians(times).items()))
    eager = paired_ratio(times, "PyWavelets", "eager")
    text, reached = f"{eager:.1f}x eager (needs {NEEDED_EAGER:.0f}x)", eager >= NEEDED_EAGER
    if "compiled" in ours:
        ratio = paired_ratio(times, "PyWavelets", "compiled")
        text, reached = (
            f"{text}, {ratio:.1f}x compiled (needs {NEEDED_COMPILED:.0f}x)",
            reached and ratio >= NEEDED_COMPILED,
        )
    else:
        text += ", compiled not measured: no C++ compiler"
    return verdict("Haar transform over PyWavelets", f"{text}, largest difference {error:.0e}", reached=reached)


def _by_pywt(image: NDArray[np.float32]) -> NDArray[np.float32]:
    approximation, details = pywt.dwt2(image, "haar", mode="periodization")
    return np.concatenate([approximation, *details])


if __name__ == "__main__":
    sys.exit(without_options(main, __doc__))
