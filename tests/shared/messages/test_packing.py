import numpy as np
import pytest
from pydantic import ValidationError

from shared.messages.packing import Manifest, TensorSpec, pack, unpack


def test_names_and_numbers_of_tensors_are_bounded():
    assert TensorSpec(name="x" * 256, shape=(1,) * 8).num_elements == 1
    for name, shape in (("x" * 257, (1,)), ("", (1,)), ("x", (1,) * 9), ("x", (-1,)), ("x", (2**40,))):
        with pytest.raises(ValidationError):
            TensorSpec(name=name, shape=shape)
    few = tuple(TensorSpec(name=f"t{number}", shape=()) for number in range(20_001))
    assert Manifest(tensors=few[:-1]).num_elements == 20_000
    with pytest.raises(ValidationError):
        Manifest(tensors=few)
    with pytest.raises(ValidationError, match="repeats a name"):
        Manifest(tensors=(few[0], few[0]))


def test_tensors_come_back_from_their_places():
    tensors = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.full((1,), 9, np.float32)}
    manifest = Manifest.of(tensors)
    flat = pack(tensors, manifest)
    assert sorted(flat.tolist()) == [0, 1, 2, 3, 4, 5, 9]
    back = unpack(flat, manifest)
    assert back.keys() == tensors.keys()
    assert all((back[name] == tensor).all() and back[name].shape == tensor.shape for name, tensor in tensors.items())
