"""Which images an optimizer step sees: a seeded permutation per epoch, computable for any step without a history."""

import functools

import numpy as np
from numpy.typing import NDArray

from shared.seeding import Streams


class DataOrder:
    """Step s takes places s * batch ... of an endless row of epochs, each epoch in its own random order.

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
