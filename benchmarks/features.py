"""Features of many images: images per second, and that memory does not grow with their number.

Without arguments the random network, which needs no weights; `--extractor SPEC [--weights FILE]` for another.
"""

import argparse
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.measure import verdict
from shared.features import load_extractor
from shared.statistics import accumulate

SEED = 0
IMAGES, WARM, BATCH, SIDE = 10_000, 2000, 64, 64
ALLOWED_GROWTH = 1.10


def main(arguments: Sequence[str] = ()) -> int:
    """Print speed and peak memory after 2,000 and 10,000 images; 0 when the peak is flat."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--extractor", default="random-inception")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--weights-sha256", default="")
    parser.add_argument("--images", type=int, default=IMAGES)
    options = parser.parse_args(arguments)
    extractor = load_extractor(options.extractor, weights=options.weights, weights_sha256=options.weights_sha256)
    accumulate(extractor.batches(images(WARM)), extractor.space)
    early = peak_mb()
    start, cpu = time.perf_counter(), time.process_time()
    accumulate(extractor.batches(images(options.images)), extractor.space)
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    late = peak_mb()
    text = (
        f"{options.images:,} images: {options.images / wall:.0f} images/s on {torch.get_num_threads()} threads, "
        f"{options.images / cpu:.0f} per CPU second, peak {late:.0f} MB after {early:.0f} MB at {WARM:,}"
    )
    return verdict(f"features, {options.extractor}", text, reached=late <= early * ALLOWED_GROWTH)


def images(number: int) -> Iterator[torch.Tensor]:
    """Batches of random pixels: the content does not matter to speed."""
    generator = torch.Generator().manual_seed(SEED)
    for start in range(0, number, BATCH):
        shape = (min(BATCH, number - start), 3, SIDE, SIDE)
        yield torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def peak_mb() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
