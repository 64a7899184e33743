"""Features of many images: images per second, peak memory, and that what is held does not grow with their number.

Memory is what the process holds after freed blocks went back to the system (`malloc_trim`), 2,000 images into the run
and at its end, with everything alive. The peak is printed beside it; it wanders by a tenth between runs of any length,
by which temporaries of a batch happen to be alive and where the allocator puts them.

Without arguments the random network, which needs no weights; `--extractor SPEC [--weights FILE]` for another.
`--against` times Inception's features beside torch-fidelity's own module, the same batches in turn, and compares them.
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

from benchmarks.measure import cpu_seconds, not_measured, paired_ratio, verdict
from shared.evaluation.extractor import Extractor
from shared.evaluation.feature_statistics import accumulate
from shared.evaluation.networks import INCEPTION, load_extractor

SEED = 0
IMAGES, WARM, BATCH, SIDE = 10_000, 2000, 64, 64
AGAINST_ROUNDS, AGAINST_BATCH = 3, 32
NEEDED_SPEED, ALLOWED_DIFFERENCE = 1.0, 1e-4
"""Of `--against`: times as fast as torch-fidelity's module, and relative difference of the features."""
ALLOWED_SHARE = 0.25
"""Of what it would take to keep the features of the images in between: the smallest way to be not flat."""


def main(arguments: Sequence[str] = ()) -> int:
    """Print speed and memory; 0 when memory is flat from 2,000 images on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--extractor", default="random-inception")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--weights-sha256", default="")
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--against", action="store_true", help="Inception beside torch-fidelity's own module")
    options = parser.parse_args(arguments)
    if options.against:
        if not options.weights:
            return not_measured("features --against", "give --weights FILE of the Inception network")
        return against_torch_fidelity(options.weights, options.weights_sha256)
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


def against_torch_fidelity(weights: Path, digest: str) -> int:
    """Print how many times as fast our features are, and how far from theirs; 0 when neither slower nor different."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.set_num_threads(1)
    ours: Extractor = load_extractor(INCEPTION, weights=weights, weights_sha256=digest)
    theirs = FeatureExtractorInceptionV3(INCEPTION, ["2048"], feature_extractor_weights_path=str(weights)).eval()
    (batch,) = images(AGAINST_BATCH, [0.0])
    with torch.no_grad():
        expected = theirs(batch)[0]
        found = torch.from_numpy(ours(batch))
        actions = {"torch-fidelity": lambda: theirs(batch), "ours": lambda: ours(batch)}
        times = cpu_seconds(actions, AGAINST_ROUNDS)
    difference = float((found - expected).abs().max() / expected.abs().max())
    ratio = paired_ratio(times, "torch-fidelity", "ours")
    text = (
        f"{AGAINST_BATCH / min(times['ours']):.1f} images per CPU second, {ratio:.2f}x torch-fidelity's module (needs "
        f"{NEEDED_SPEED:g}x), relative difference {difference:.1e} (at most {ALLOWED_DIFFERENCE:g})"
    )
    reached = ratio >= NEEDED_SPEED and difference <= ALLOWED_DIFFERENCE
    return verdict("Inception features, one thread", text, reached=reached)


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
