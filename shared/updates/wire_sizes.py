"""How large numbers are as they travel. No torch."""

from typing import Literal

import numpy as np

from shared.updates.int8_blocks import num_bytes

WireDtype = Literal["float32", "bfloat16", "int8"]
ITEMS: dict[WireDtype, np.dtype[np.float32] | np.dtype[np.uint16] | np.dtype[np.uint8]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(np.uint16),
    "int8": np.dtype(np.uint8),
}
"""What the array of each form consists of: numbers, their upper halves, bytes of `shared.updates.int8_blocks`."""


def wire_length(num_elements: int, dtype: WireDtype) -> int:
    """Items of the array that so many numbers travel in."""
    return num_bytes(num_elements) if dtype == "int8" else num_elements


def wire_bytes(num_elements: int, dtype: WireDtype) -> int:
    """Bytes of that array."""
    return wire_length(num_elements, dtype) * ITEMS[dtype].itemsize
