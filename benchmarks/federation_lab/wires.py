"""Weights and updates of the stack as they travel: rounded by the product's own code, one network after another."""
# ruff: noqa: N803 - shape suffixes

import numpy as np
import torch
from torch import Tensor

from benchmarks.federation_lab.arms import Wire
from shared.messages.packing import decode, encode
from shared.updates.int8_blocks import BLOCK

INTEGERS = ("int8", "int4")


def rounded(rows_MN: Tensor, wire: Wire) -> Tensor:
    """What arrives of `rows_MN`, (M, N)."""
    return torch.from_numpy(np.stack([_rounded(row, wire) for row in rows_MN.numpy()]))


class Feedback:
    """Rows that are sent again and again: what a wire of 8 bits loses of one joins the next."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self._lost: Tensor | None = None

    def sent(self, rows_MN: Tensor, shares_M: Tensor | None = None) -> Tensor:
        """What arrives; who has no share was not asked, and keeps what was lost."""
        if self.wire not in INTEGERS:
            return rounded(rows_MN, self.wire)
        wanted = rows_MN if self._lost is None else rows_MN + self._lost
        arrived = rounded(wanted, self.wire)
        lost = wanted - arrived
        if shares_M is not None:
            lost = torch.where(shares_M[:, None] > 0, lost, wanted - rows_MN)
        self._lost = lost
        return arrived


class Download:
    """The global weights as sites have them: what is sent as int8 is the change, so that nothing is lost for good."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self._known: Tensor | None = None

    def sent(self, weights_GN: Tensor) -> Tensor:
        """What the sites start from; whoever knows nothing gets the numbers as they are."""
        if self.wire not in INTEGERS:
            return rounded(weights_GN, self.wire)
        known = weights_GN if self._known is None else self._known
        self._known = known + rounded(weights_GN - known, self.wire)
        return self._known


def _rounded(row: np.ndarray, wire: Wire) -> np.ndarray:
    row = np.ascontiguousarray(row)
    return _in_four_bits(row) if wire == "int4" else decode(encode(row, wire), wire)


def _in_four_bits(row: np.ndarray) -> np.ndarray:
    """As 8-bit blocks, with integers from -7 to 7: the product has no such wire."""
    blocks = np.pad(row, (0, -len(row) % BLOCK)).reshape(-1, BLOCK)
    scales = np.abs(blocks).max(1, keepdims=True) / np.float32(7)
    integers = np.rint(np.divide(blocks, scales, out=np.zeros_like(blocks), where=scales > 0))
    return (integers * scales).reshape(-1)[: len(row)]
