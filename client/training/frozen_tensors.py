"""The frozen tensors of a run, which travel once: kept at the site under their digest."""

import io

import numpy as np
from numpy.typing import NDArray

from client.home import Home
from client.policy.refusals import RefusedError
from client.private_files import write_private
from shared.messages.training import TrainRequest

MOST_BASES = 2
"""Newest sets that are kept; each is about as large as the model."""


def frozen_tensors(home: Home, request: TrainRequest) -> NDArray[np.float32] | None:
    """Packed frozen tensors of a run; None where nothing is frozen.

    They come from the request, which then is remembered, or from an earlier one.

    Raises:
        RefusedError: the request has none and none are held.
    """
    digest = request.header.base_digest
    if not digest:
        return None
    path = home.base / f"{digest}.npy"
    if request.base is not None:
        buffer = io.BytesIO()
        np.save(buffer, request.base, allow_pickle=False)
        write_private(path, buffer.getvalue())
        for old in sorted(home.base.glob("*.npy"), key=lambda each: each.stat().st_mtime)[:-MOST_BASES]:
            old.unlink()
        return request.base
    if not path.exists():
        raise RefusedError("base_missing", "the site does not hold the frozen tensors of this run yet")
    stored: NDArray[np.float32] = np.load(path, allow_pickle=False)
    return stored
