"""What every message of ours is made of: a header as JSON in a ConfigRecord, and flat arrays. No torch, no pickle.

Whatever comes from the other side is checked here before it is parsed: schema, sizes, shapes.
"""

from typing import Any, TypeVar

import numpy as np
from flwr.app import ConfigRecord, RecordDict
from numpy.typing import NDArray
from pydantic import ValidationError
from pydantic_core import from_json

from shared.experiment.config import Section, explain
from shared.messages.packing import MessageError
from shared.messages.text import clean

SCHEMA_VERSION = 1
MAX_HEADER_BYTES = 4 * 2**20
Header = TypeVar("Header", bound=Section)


def header_record(header: Section) -> ConfigRecord:
    """A header as it travels.

    Raises:
        MessageError: too large.
    """
    text = header.model_dump_json()
    if len(text) > MAX_HEADER_BYTES:
        raise MessageError(f"message header has {len(text)} bytes, at most {MAX_HEADER_BYTES}: train fewer tensors")
    return ConfigRecord({"json": text})


def read_header(content: RecordDict) -> Any:  # noqa: ANN401  # JSON, validated by the caller's model
    """The JSON of a message's header, of our schema version.

    Raises:
        MessageError: there is none, it is too large, or of another version.
    """
    try:
        text = content.config_records["header"]["json"]
    except KeyError as error:
        raise MessageError("message without a header: both sides need the same maskfed version") from error
    return parse_header(text)


def parse_header(text: object) -> Any:  # noqa: ANN401  # JSON, validated by the caller's model
    """The JSON of a header, of our schema version, with printable texts and integers of 64 bits.

    Raises:
        MessageError: no text, too large, not JSON, nested too deeply, a number that is none, or of another version.
    """
    if not isinstance(text, str) or len(text) > MAX_HEADER_BYTES:
        raise MessageError(f"message header is not text of at most {MAX_HEADER_BYTES} bytes")
    try:
        # This parser has a limit of depth and knows no Infinity: unlike json's, it raises nothing but ValueError.
        header = clean(from_json(text, allow_inf_nan=False))
    except ValueError as error:
        raise MessageError(f"message header is not JSON: {error}") from error
    version = header.get("schema_version") if isinstance(header, dict) else None
    if version != SCHEMA_VERSION:
        raise MessageError(f"message schema {version!r}, this side speaks {SCHEMA_VERSION}: install the same version")
    return header


def read_array(content: RecordDict, name: str, num_elements: int, item_bytes: int = 4) -> NDArray[Any]:
    """A flat array of a message, of at most `item_bytes` bytes an element.

    Raises:
        MessageError: it is missing, not (num_elements,), or not readable.
    """
    record = content.array_records.get("arrays")
    array = None if record is None else record.get(name)
    if array is None:
        raise MessageError(f"message without the array {name!r}")
    # The declared shape is checked before the bytes are parsed: a hostile size must not cost memory.
    if tuple(array.shape) != (num_elements,):
        raise MessageError(f"array {name!r} has shape {tuple(array.shape)}, agreed was ({num_elements},)")
    if len(array.data) > num_elements * item_bytes + 1024:
        raise MessageError(f"array {name!r} carries {len(array.data)} bytes for {num_elements} elements")
    try:
        value: NDArray[Any] = array.numpy()
    except Exception as error:  # a hostile size or header makes NumPy raise anything
        raise MessageError(f"array {name!r} cannot be read ({type(error).__name__})") from error
    if value.shape != (num_elements,):
        raise MessageError(f"array {name!r} holds shape {value.shape}, agreed was ({num_elements},)")
    return value


def read_bytes(content: RecordDict, name: str, limit: int) -> bytes:
    """A file of a message, sent as a flat uint8 array.

    Raises:
        MessageError: it is missing, longer than `limit` bytes, or not readable.
    """
    record = content.array_records.get("arrays")
    array = None if record is None else record.get(name)
    if array is None:
        raise MessageError(f"message without the array {name!r}")
    shape = tuple(array.shape)
    if array.dtype != "uint8" or len(shape) != 1 or not 0 <= shape[0] <= limit:
        raise MessageError(f"array {name!r} is {array.dtype} {shape}, agreed was uint8 of at most {limit} bytes")
    return bytes(read_array(content, name, shape[0]).astype(np.uint8, copy=False).tobytes())


def validated(model: type[Header], header: Any) -> Header:  # noqa: ANN401  # JSON
    """The header as `model`.

    Raises:
        MessageError: unknown keys or values out of range.
    """
    try:
        return model.model_validate(header)
    except ValidationError as error:
        raise MessageError(f"message header: {explain(error)}") from error
    except Exception as error:  # a rule over several fields that did not expect these values
        raise MessageError(f"message header cannot be read ({type(error).__name__})") from error
