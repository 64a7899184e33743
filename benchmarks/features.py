"""Features of many images: images per second, peak memory, and that what is held does not grow with their number.

Memory is what the process holds after freed blocks went back to the system (`malloc_trim`), 2,000 images into the run
and at its end, with everything alive. The peak is printed beside it; it wanders by a tenth between runs of any length,
by which temporaries of a batch happen to be alive and where the allocator puts them.

Without arguments the random network, which needs no weights; `--extractor SPEC [--weights FILE]` for another.
"""

import argparse
import ctypes
import gc
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.measure import verdict
from shared.evaluation.feature_statistics import accumulate
from shared.evaluation.networks import load_extractor

SEED = 0
IMAGES, WARM, BATCH, SIDE = 10_000, 2000, 64, 64
ALLOWED_SHARE = 0.25
"""Of what it would take to keep the features of the images in between: the smallest way to be not flat."""


def main(arguments: Sequence[str] = ()) -> int:
    """Print speed and memory; 0 when memory is flat from 2,000 images on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--extractor", default="random-inception")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--weights-sha256", default="")
    parser.add_argument("--images", type=int, default=IMAGES)
    options = parser.parse_args(arguments)
    extractor = load_extractor(options.extractor, weights=options.weights, weights_sha256=options.weights_sha256)
    held: list[float] = []
    wall, cpu = time.perf_counter(), time.process_time()
    accumulate(extractor.batches(images(options.images, held)), extractor.space)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    growth, allowed = held[-1] - held[0], ALLOWED_SHARE * (options.images - WARM) * extractor.width * 4 / 1e6
    text = (
        f"{options.images:,} images: {options.images / wall:.0f} images/s on {torch.get_num_threads()} threads, "
        f"{options.images / cpu:.0f} per CPU second, peak {peak_mb():.0f} MB; holds {held[-1]:.1f} MB at the end, "
        f"{growth:+.1f} MB since {WARM:,} (at most {allowed:.1f})"
    )
    return verdict(f"features, {options.extractor}", text, reached=growth <= allowed)


def images(number: int, held: list[float]) -> Iterator[torch.Tensor]:
    """Batches of random pixels (the content does not matter to speed); notes memory at `WARM` images and at the end."""
    generator = torch.Generator().manual_seed(SEED)
    for start in range(0, number, BATCH):
        if not held and start >= WARM:
            held.append(held_mb())
        shape = (min(BATCH, number - start), 3, SIDE, SIDE)
        yield torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    held.append(held_mb())


def held_mb() -> float:
    """Anonymous resident memory of this process, without free blocks that the allocator keeps.

    Pages of files, such as the libraries' code, do not count: the system takes them back and reads them again at will.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) * 1024 / 1e6


def peak_mb() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
