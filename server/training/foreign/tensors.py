"""What a tensor of a foreign file must be."""

import torch
from torch import Tensor

from shared.errors import InputError


def dense_numbers(key: str, tensor: Tensor) -> Tensor:
    """A weight or table as float32.

    Raises:
        InputError: sparse, quantised, empty, of integers, or with a number that is not finite; the line names the key.
    """
    what = f"{tensor.dtype}".removeprefix("torch.")
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_nested:
        raise InputError(f"key {key!r} is sparse, quantised or empty ({what}): store dense floating-point numbers")
    if not tensor.is_floating_point():
        raise InputError(f"key {key!r} holds {what} numbers, not floating-point ones: give the file before it")
    try:
        values = tensor.float()
    except RuntimeError as error:  # packed kinds, of which torch only knows the name
        raise InputError(
            f"key {key!r} holds {what} numbers, which cannot be read: store float32 or bfloat16"
        ) from error
    if lost := int((~torch.isfinite(values)).sum()):
        raise InputError(f"key {key!r} has {lost} of {values.numel()} numbers that are not finite: give an earlier one")
    return values
