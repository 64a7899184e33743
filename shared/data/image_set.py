"""Sets of decoded images: what training, evaluation and sites read batches from. No torch at import.

Shapes: N images, C = 3 channels, H = W pixels, B images of a batch.
"""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from shared.errors import InputError

if TYPE_CHECKING:
    import torch

SYNTHETIC_PREFIX = "synthetic:"
SYNTHETIC_IMAGES = 10_000

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
    ) -> None:
        self._open_pixels, self._num_images, self.size = open_pixels, num_images, size
        self.persons, self.names, self.num_unreadable = persons, names, num_unreadable

    def __len__(self) -> int:
        """Number of images N."""
        return self._num_images

    @functools.cached_property
    def images(self) -> NDArray[np.uint8]:
        """All pixels, (N, 3, H, W) uint8; a read-only memory map when on disk, opened at first use."""
        return self._open_pixels()

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


@functools.lru_cache(maxsize=8)
def synthetic_images(spec: str, size: int) -> ImageCache:
    """Synthetic faces, in memory, for a spec `synthetic:<site>[:<num_images>[:<seed>]]`.

    Raises:
        InputError: bad spec, or a site or number that the generator refuses.
    """
    from shared.data import synthetic

    site, *numbers = spec.removeprefix(SYNTHETIC_PREFIX).split(":")
    if not site or len(numbers) > 2 or not all(number.isdecimal() for number in numbers):
        raise InputError(f"images {spec!r}: give synthetic:<site>[:<num_images>[:<seed>]], as synthetic:public:10000")
    num_images, seed = (*map(int, numbers), *(SYNTHETIC_IMAGES, 0)[len(numbers) :])
    if num_images < 1:
        raise InputError(f"images {spec!r}: {num_images} images, at least 1 are needed")
    images, persons = synthetic.generate(num_images, size, seed, site=site)
    return ImageCache(lambda: images, num_images, size, persons=persons)
