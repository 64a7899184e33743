"""Sets of decoded images: what training, evaluation and sites read batches from, in which order. No torch at import.

Shapes: N images, C = 3 channels, H = W pixels, B images of a batch.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from shared.errors import InputError
from shared.seeding import Streams

if TYPE_CHECKING:
    import torch

SCHEMA_VERSION = 2
CACHE_FILE, INDEX_FILE, IMAGES_FILE = "cache.json", "index.json", "images.u8"
SYNTHETIC_PREFIX = "synthetic:"
SYNTHETIC_IMAGES = 10_000
_MOST_DIGITS = 20

Ids = Sequence[int] | NDArray[np.int64]


class Images(Protocol):
    """What training needs of a set of images."""

    def __len__(self) -> int:
        """Number of images N."""

    def batch(self, ids: Ids) -> "torch.Tensor":
        """Images `ids` as uint8 (B, 3, H, W)."""


class ImageCache:
    """Decoded images, read from disk or held in memory.

    Attributes:
        names: file names in the source, or () for images that never were files.
        persons: (N,) int64 person of each image, numbered from 0 (synthetic: the person's id), or None when unknown.
        num_unreadable: files of the source that did not decode and are not among the N.
        ignored: files of the source that are no images by their suffix, by suffix.
    """

    def __init__(
        self,
        open_pixels: Callable[[], NDArray[np.uint8]],
        num_images: int,
        size: int,
        *,
        persons: NDArray[np.int64] | None = None,
        names: tuple[str, ...] = (),
        num_unreadable: int = 0,
        ignored: Mapping[str, int] | None = None,
        fingerprint: str = "",
    ) -> None:
        self._open_pixels, self._num_images, self.size = open_pixels, num_images, size
        self.persons, self.names, self.num_unreadable = persons, names, num_unreadable
        self.ignored, self._fingerprint = dict(ignored or {}), fingerprint

    def __len__(self) -> int:
        """Number of images N."""
        return self._num_images

    @functools.cached_property
    def images(self) -> NDArray[np.uint8]:
        """All pixels, (N, 3, H, W) uint8; a read-only memory map when on disk, opened at first use."""
        return self._open_pixels()

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of all pixels in order: the same images, wherever they lie."""
        return self._fingerprint or hashlib.sha256(np.ascontiguousarray(self.images).data).hexdigest()

    def batch(self, ids: Ids) -> "torch.Tensor":
        """Images `ids` as a new uint8 tensor (B, 3, H, W) on the CPU."""
        import torch

        return torch.from_numpy(self.images[np.asarray(ids, np.int64)])

    def select(self, ids: Ids) -> "ImageCache":
        """The images `ids` as a set of their own; the pixels stay where they are until a batch is read."""
        rows = np.asarray(ids, np.int64)
        persons = None if self.persons is None else self.persons[rows]
        names = tuple(self.names[row] for row in rows) if self.names else ()
        return _Selection(self, rows, persons, names)


class _Selection(ImageCache):
    def __init__(
        self, whole: ImageCache, rows: NDArray[np.int64], persons: NDArray[np.int64] | None, names: tuple[str, ...]
    ) -> None:
        super().__init__(lambda: whole.images[rows], len(rows), whole.size, persons=persons, names=names)
        self._whole, self._rows = whole, rows

    def batch(self, ids: Ids) -> "torch.Tensor":
        return self._whole.batch(self._rows[np.asarray(ids, np.int64)])


class ResidentImages:
    """All pixels in the memory of a device: a batch is one gather there, nothing is copied to it."""

    def __init__(self, images: ImageCache, device: "torch.device | str") -> None:
        import torch

        self._pixels = torch.from_numpy(np.array(images.images)).to(device)

    def __len__(self) -> int:
        """Number of images N."""
        return len(self._pixels)

    def batch(self, ids: Ids) -> "torch.Tensor":
        """Images `ids` as uint8 (B, 3, H, W) on the device."""
        import torch

        rows = torch.from_numpy(np.asarray(ids, np.int64))
        return self._pixels.index_select(0, rows.to(self._pixels.device, non_blocking=True))


class DataOrder:
    """Which images a step sees: step s takes places s * batch ... of an endless row of epochs.

    Each epoch has its own random order.

    Attributes:
        num_images: N; may be smaller than the batch.
        batch: images per step over all processes.
    """

    def __init__(self, num_images: int, batch: int, streams: Streams) -> None:
        assert num_images > 0
        self.num_images, self.batch, self._streams = num_images, batch, streams
        self._permutation = functools.lru_cache(maxsize=2)(self._draw)

    def ids(self, step: int, part: int = 0, parts: int = 1) -> NDArray[np.int64]:
        """Image numbers of 0-based `step`: the `part`-th of `parts` equal shares, one share per process."""
        share = self.batch // parts
        places = np.arange(share) + step * self.batch + part * share
        epochs, offsets = np.divmod(places, self.num_images)
        rows = np.empty(share, np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows[here] = self._permutation(int(epoch))[offsets[here]]
        return rows

    def _draw(self, epoch: int) -> NDArray[np.int64]:
        seed = self._streams.seed("order", epoch)
        return np.random.Generator(np.random.PCG64(seed)).permutation(self.num_images)


def open_cache(folder: Path, check_source: bool = True) -> ImageCache:
    """Open a finished cache; only its index is read.

    Args:
        folder: where `shared.data.image_cache.build_cache` wrote it.
        check_source: also compare with the folder or zip it was made from, when that still exists (one file listing).

    Raises:
        InputError: not a cache, unfinished, truncated, of another schema or decoder, or older than its source.
    """
    # With Pillow, which a step on synthetic images does not need.
    from shared.data.images import list_images
    from shared.data.pixels import DECODING_VERSION

    facts = read_facts(folder, CACHE_FILE)
    for key, own in (("schema", SCHEMA_VERSION), ("decoding", DECODING_VERSION)):
        if facts.get(key) != own:
            raise InputError(f"image cache {folder}: {key} {facts.get(key)!r}, not {own}; {_remedy(facts)}")
    index = read_facts(folder, INDEX_FILE)
    try:
        counts = num_images, size, num_unreadable = [facts[key] for key in ("num_images", "size", "num_unreadable")]
        source, fingerprint, listed = Path(facts["source"]), str(facts["content"]), facts["fingerprint"]
        persons = None if index["persons"] is None else np.asarray(index["persons"], np.int64)
        names, ignored = tuple(index["names"]), dict(facts["ignored"])
        if not all(type(count) is int and count >= 0 for count in (*counts, *ignored.values())):
            raise ValueError("a count is none")
        if not all(isinstance(name, str) for name in names) or (persons is not None and persons.shape != (len(names),)):
            raise ValueError("other names or persons")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"image cache {folder}: its facts are damaged ({error}); {_remedy(facts)}") from error
    path = folder / IMAGES_FILE
    expected, found = num_images * 3 * size * size, path.stat().st_size if path.exists() else 0
    if found != expected or len(names) != num_images:
        raise InputError(
            f"image cache {folder}: {IMAGES_FILE} has {found} bytes where {num_images} images of {size} x {size} need "
            f"{expected}: truncated or overwritten; delete the folder and {_remedy(facts)}"
        )
    if check_source and source.exists() and list_images(source).fingerprint != listed:
        raise InputError(f"image cache {folder} is older than its images in {source}: {_remedy(facts)}")
    return ImageCache(
        lambda: np.memmap(path, np.uint8, "r", shape=(num_images, 3, size, size)),
        num_images,
        size,
        persons=persons,
        names=names,
        num_unreadable=num_unreadable,
        ignored=ignored,
        fingerprint=fingerprint,
    )


def read_facts(folder: Path, name: str) -> dict[str, Any]:
    """One of the JSON files of a cache folder.

    Raises:
        InputError: missing or damaged.
    """
    try:
        tree = json.loads((folder / name).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"image cache {folder}: no readable {name} ({error.strerror}); a build that was interrupted goes on "
            "with the same `maskfed-server data cache` command"
        ) from error
    except ValueError as error:
        raise InputError(f"image cache {folder}: {name} is damaged; delete the folder and cache again") from error
    if isinstance(tree, dict):
        return tree
    raise InputError(f"image cache {folder}: {name} is damaged; delete the folder and cache again")


def _remedy(facts: dict[str, Any]) -> str:
    command = f"maskfed-server data cache {facts.get('source')} --size {facts.get('size')}"
    return f"run `{command}` again (at a site: `maskfed-client data scan`)"


@functools.lru_cache(maxsize=8)
def synthetic_images(spec: str, size: int) -> ImageCache:
    """Synthetic faces, in memory, for a spec `synthetic:<site>[:<num_images>[:<seed>]]`.

    Raises:
        InputError: bad spec, or a site or number that the generator refuses.
    """
    from shared.data import synthetic

    site, *numbers = spec.removeprefix(SYNTHETIC_PREFIX).split(":")
    is_plain = all(number.isascii() and number.isdecimal() and len(number) < _MOST_DIGITS for number in numbers)
    if not site or len(numbers) > 2 or not is_plain:
        raise InputError(f"images {spec!r}: give synthetic:<site>[:<num_images>[:<seed>]], as synthetic:public:10000")
    num_images, seed = (*map(int, numbers), *(SYNTHETIC_IMAGES, 0)[len(numbers) :])
    if num_images < 1:
        raise InputError(f"images {spec!r}: {num_images} images, at least 1 are needed")
    images, persons = synthetic.generate(num_images, size, seed, site=site)
    return ImageCache(lambda: images, num_images, size, persons=persons)
