"""Reading a training batch from the image cache against decoding its files with PIL, at 256 px, on one thread.

Both sides end with the same uint8 batch: what training reads, the cast to [-1, 1] comes after it on the device. The
files are synthetic faces with a little noise, so that they compress about as badly as photographs. JPEG decodes faster
than PNG, so it decides. The cache is warm, as it is from the second epoch on when it fits into memory.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.measure import Action, cpu_seconds, paired_ratio, verdict, without_options
from benchmarks.scratch import scratch
from shared.data.image_cache import build_cache
from shared.data.image_set import ImageCache
from shared.data.synthetic import generate

SEED = 0
ROUNDS = 9
NEEDED = 8.0
SIZE, NUM_IMAGES, BATCH = 256, 512, 64
SAVE_OPTIONS: dict[str, dict[str, int]] = {"png": {}, "jpg": {"quality": 90}}


def main() -> int:
    """Print images per second and the ratio for both formats; 0 when the smaller one is enough."""
    torch.set_num_threads(1)
    ratios = []
    with scratch() as folder:
        for suffix in SAVE_OPTIONS:
            source = folder / suffix
            write_images(source, suffix)
            cache = build_cache(source, folder / f"{suffix}.cache", SIZE)
            ratios.append(compare(source, cache, suffix))
    figure = f"{min(ratios):.0f}x (needs {NEEDED:.0f}x)"
    return verdict("cached read against PIL decode, 256 px", figure, reached=min(ratios) >= NEEDED)


def write_images(folder: Path, suffix: str) -> None:
    """Write synthetic faces with sensor-like noise as files of one format."""
    folder.mkdir()
    images, _ = generate(NUM_IMAGES, SIZE, SEED)
    random = np.random.default_rng(SEED)
    for number, image in enumerate(images):
        noisy = image.transpose(1, 2, 0) + random.normal(0, 6, (SIZE, SIZE, 3))
        picture = Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8))
        picture.save(folder / f"{number:04d}.{suffix}", **SAVE_OPTIONS[suffix])


def compare(source: Path, cache: ImageCache, suffix: str) -> float:
    """CPU time of a PIL batch over that of a cached batch."""
    random = np.random.default_rng(SEED)
    rows = [random.integers(0, NUM_IMAGES, BATCH) for _ in range(ROUNDS + 1)]
    decoded, cached = iter(rows), iter(rows)
    assert torch.equal(decode_batch(source, cache, rows[0]), cache.batch(rows[0]))
    actions: dict[str, Action] = {
        "PIL": lambda: decode_batch(source, cache, next(decoded)),
        "cache": lambda: cache.batch(next(cached)),
    }
    times = cpu_seconds(actions, ROUNDS)
    rates = {name: BATCH / sorted(seconds)[ROUNDS // 2] for name, seconds in times.items()}
    ratio = paired_ratio(times, "PIL", "cache")
    print(f"{suffix}: PIL {rates['PIL']:,.0f} images/s, cache {rates['cache']:,.0f} images/s, {ratio:.1f}x")
    return ratio


def decode_batch(source: Path, cache: ImageCache, rows: np.ndarray) -> Tensor:
    """The batch from its files."""
    pictures = []
    for row in rows:
        with Image.open(source / cache.names[row]) as opened:
            pictures.append(torch.from_numpy(np.array(opened.convert("RGB"))).permute(2, 0, 1))
    return torch.stack(pictures)


if __name__ == "__main__":
    sys.exit(without_options(main, __doc__))
