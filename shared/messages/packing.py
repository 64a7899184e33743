"""Tensors as they travel: packed into one flat array in a manifest's order, as float32, bfloat16 or int8. No torch."""

import hashlib
import math
from collections.abc import Mapping
from typing import Any, Self, cast, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from shared.errors import InputError
from shared.experiment.config import Section
from shared.messages.text import one_line
from shared.updates.int8_blocks import from_blocks, to_blocks
from shared.updates.wire_sizes import ITEMS, WireDtype

MAX_ELEMENTS = 2**31


class MessageError(InputError):
    """A message from the other side does not follow the protocol; the text is one line, whatever it quotes of it."""

    def __init__(self, text: str) -> None:
        super().__init__(one_line(text))


class TensorSpec(Section):
    """Name and shape of one float32 tensor."""

    name: str = Field(min_length=1, max_length=256)
    shape: tuple[int, ...] = Field(max_length=8)

    @model_validator(mode="after")
    def _sizes(self) -> Self:
        if any(side < 0 for side in self.shape) or self.num_elements > MAX_ELEMENTS:
            raise ValueError(
                f"tensor {self.name} has shape {self.shape}: sides from 0, at most {MAX_ELEMENTS} elements"
            )
        return self

    @property
    def num_elements(self) -> int:
        """Product of the shape."""
        return math.prod(self.shape)


class Manifest(Section):
    """Order and shapes of the tensors in one packed array."""

    tensors: tuple[TensorSpec, ...] = Field(max_length=20_000)

    @model_validator(mode="after")
    def _unique(self) -> Self:
        names = [tensor.name for tensor in self.tensors]
        if len(set(names)) != len(names) or self.num_elements > MAX_ELEMENTS:
            raise ValueError(f"the manifest repeats a name or passes {MAX_ELEMENTS} elements")
        return self

    @property
    def num_elements(self) -> int:
        """Elements of the packed array."""
        return sum(tensor.num_elements for tensor in self.tensors)

    @classmethod
    def of(cls, tensors: Mapping[str, NDArray[np.float32]]) -> "Manifest":
        """The manifest of `tensors`, sorted by name."""
        return cls(tensors=tuple(TensorSpec(name=name, shape=tensors[name].shape) for name in sorted(tensors)))


def pack(tensors: Mapping[str, NDArray[np.float32]], manifest: Manifest) -> NDArray[np.float32]:
    """One flat float32 array (num_elements,) in the manifest's order.

    Raises:
        MessageError: a tensor is missing or has another shape.
    """
    flat = np.empty(manifest.num_elements, np.float32)
    offset = 0
    for spec in manifest.tensors:
        tensor = tensors.get(spec.name)
        if tensor is None or tensor.shape != spec.shape:
            found = "is missing" if tensor is None else f"has shape {tensor.shape}"
            raise MessageError(f"tensor {spec.name} {found}, the manifest says {spec.shape}: use the same model")
        flat[offset : offset + spec.num_elements] = tensor.reshape(-1)
        offset += spec.num_elements
    return flat


def unpack(flat: NDArray[np.float32], manifest: Manifest) -> dict[str, NDArray[np.float32]]:
    """Views into `flat` (num_elements,) by name; the inverse of `pack`.

    Raises:
        MessageError: the length does not fit.
    """
    if flat.shape != (manifest.num_elements,):
        raise MessageError(f"packed array has shape {flat.shape}, the manifest asks for ({manifest.num_elements},)")
    tensors, offset = {}, 0
    for spec in manifest.tensors:
        tensors[spec.name] = flat[offset : offset + spec.num_elements].reshape(spec.shape)
        offset += spec.num_elements
    return tensors


def wire_dtype_of(wire: NDArray[Any]) -> WireDtype:
    """Which form an array that is not masked has.

    Raises:
        MessageError: none.
    """
    for dtype in get_args(WireDtype):
        if wire.dtype == ITEMS[dtype]:
            return cast("WireDtype", dtype)
    raise MessageError(f"array is {wire.dtype}, and nothing travels so")


def encode(flat: NDArray[np.float32], dtype: WireDtype) -> NDArray[Any]:
    """`flat` in its wire form: float32 as it is, bfloat16 (nearest, ties to even) as uint16, int8 blocks as uint8.

    Raises:
        MessageError: a number that is not finite, as int8.
    """
    if dtype == "float32":
        return np.ascontiguousarray(flat, np.float32)
    if dtype == "int8":
        try:
            return to_blocks(flat)
        except ValueError as error:
            raise MessageError(str(error)) from error
    bits = np.ascontiguousarray(flat, np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    # Rounding a NaN's payload could carry over into infinity: keep it a (quiet) NaN, so that checks still see it.
    is_nan = np.isnan(flat)
    if is_nan.any():
        rounded[is_nan] = np.uint16(0x7FC0)
    return rounded


def decode(wire: NDArray[Any], dtype: WireDtype) -> NDArray[np.float32]:
    """The inverse of `encode`, exact.

    Raises:
        MessageError: the array's dtype is not the agreed one, it is not flat, or no whole blocks.
    """
    if wire.dtype != ITEMS[dtype] or wire.ndim != 1:
        raise MessageError(f"array is {wire.dtype} of rank {wire.ndim}, agreed was {ITEMS[dtype]} of rank 1")
    if dtype == "float32":
        return wire
    if dtype == "int8":
        try:
            return from_blocks(wire)
        except ValueError as error:
            raise MessageError(str(error)) from error
    return (wire.astype(np.uint32) << np.uint32(16)).view(np.float32)


def array_digest(flat: NDArray[np.float32]) -> str:
    """SHA-256 of a flat float32 array, hexadecimal."""
    return hashlib.sha256(np.ascontiguousarray(flat, np.float32).data).hexdigest()
