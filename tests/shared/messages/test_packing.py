import hashlib

import numpy as np
import pytest
from pydantic import ValidationError

from shared.messages.packing import (
    Manifest,
    MessageError,
    TensorSpec,
    array_digest,
    decode,
    encode,
    pack,
    unpack,
    wire_dtype_of,
)
from shared.messages.text import MAX_LINE
from shared.updates.wire_sizes import wire_bytes, wire_length


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


def test_order_of_a_manifest_does_not_depend_on_that_of_the_tensors():
    one = {"b": np.zeros(2, np.float32), "a": np.ones(3, np.float32)}
    other = dict(reversed(one.items()))
    assert Manifest.of(one) == Manifest.of(other)
    assert [tensor.name for tensor in Manifest.of(one).tensors] == ["a", "b"]
    assert (pack(one, Manifest.of(one)) == pack(other, Manifest.of(other))).all()


def test_elements_of_a_manifest_are_bounded_together():
    half = [TensorSpec(name=name, shape=(2**30,)) for name in "abc"]
    assert Manifest(tensors=tuple(half[:2])).num_elements == 2**31
    with pytest.raises(ValidationError, match="elements"):
        Manifest(tensors=tuple(half))


@pytest.mark.parametrize("length", [0, 2, 4])
def test_packed_array_of_another_length_is_refused(length: int):
    manifest = Manifest.of({"a": np.zeros(3, np.float32)})
    with pytest.raises(MessageError, match=rf"shape \({length},\)"):
        unpack(np.zeros(length, np.float32), manifest)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_wire_form_is_of_the_agreed_type_and_flat(dtype):
    wire = encode(np.array([1.27, -0.63], np.float32), dtype)
    assert decode(wire, dtype) == pytest.approx([1.27, -0.63], rel=4e-3)
    assert len(wire) == wire_length(2, dtype) and wire.nbytes == wire_bytes(2, dtype) and wire_dtype_of(wire) == dtype
    # Others of the same size would be read as other numbers.
    others = {"float32": (np.int32, np.uint32), "bfloat16": (np.float16, np.int16), "int8": (np.int8, np.bool_)}[dtype]
    for other in (*(wire.view(each) for each in others), wire.astype(np.float64), wire[None]):
        with pytest.raises(MessageError, match="agreed was"):
            decode(other, dtype)


def test_a_form_that_nothing_travels_in_and_numbers_that_no_form_holds_are_refused():
    with pytest.raises(MessageError, match="nothing travels so"):
        wire_dtype_of(np.zeros(3, np.float64))
    with pytest.raises(MessageError, match="not finite"):
        encode(np.array([1.0, np.nan], np.float32), "int8")
    with pytest.raises(MessageError, match="no whole blocks"):
        decode(np.zeros(3, np.uint8), "int8")


def test_digest_is_of_all_bits_of_the_numbers():
    flat = np.array([1.0, 2.0 + 2**-20, -0.0], np.float32)
    assert array_digest(flat) == hashlib.sha256(flat.tobytes()).hexdigest()


def test_error_of_the_protocol_is_one_short_line_whatever_it_quotes():
    assert "\n" not in str(MessageError("a\nb"))
    assert len(str(MessageError("x" * 10**6))) == MAX_LINE
