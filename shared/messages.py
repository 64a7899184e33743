"""What travels between coordinator and sites: typed headers, and tensors packed into a few flat arrays.

Every array costs Flower two HTTP objects, so a model travels as one array of its trainable tensors, and as a second one
of its frozen tensors to a site that does not hold them yet. Headers are JSON in a ConfigRecord; nothing is pickled.
No torch: the ServerApp and a site that refuses never load it.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, Literal, Self, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray
from pydantic import Field, ValidationError, model_validator

from shared.config import Experiment, Section, explain
from shared.errors import InputError

SCHEMA_VERSION = 1
MAX_HEADER_BYTES = 4 * 2**20
MAX_ELEMENTS = 2**31
_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(np.uint16)}

Header = TypeVar("Header", bound=Section)
WireDtype = Literal["float32", "bfloat16"]
RefusalCode = Literal[
    "schema",
    "malformed",
    "experiment_not_approved",
    "code_not_approved",
    "task_not_allowed",
    "dp_required",
    "non_private_forbidden",
    "unit_mismatch",
    "noise_too_small",
    "too_many_steps",
    "too_many_rounds",
    "budget_exceeded",
    "plan_changed",
    "too_few_images",
    "data_not_ready",
    "ledger_damaged",
    "ledger_busy",
    "base_missing",
    "disk_full",
    "clock",
    "failed",
]
"""Why a site said no; `base_missing` asks for the frozen tensors, `failed` is an error of the site's own training."""


class MessageError(InputError):
    """A message from the other side does not follow the protocol."""


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


def encode(flat: NDArray[np.float32], dtype: WireDtype) -> NDArray[Any]:
    """`flat` in its wire form: float32 as it is, or bfloat16 (round to nearest even) carried as uint16."""
    if dtype == "float32":
        return np.ascontiguousarray(flat, np.float32)
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
        MessageError: the array's dtype is not the agreed one, or it is not flat.
    """
    if wire.dtype != _DTYPES[dtype] or wire.ndim != 1:
        raise MessageError(f"array is {wire.dtype} of rank {wire.ndim}, agreed was {_DTYPES[dtype]} of rank 1")
    if dtype == "float32":
        return wire
    return (wire.astype(np.uint32) << np.uint32(16)).view(np.float32)


class RequestHeader(Section):
    """What the coordinator asks of a site, besides the tensors."""

    schema_version: Literal[1] = 1
    run: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    server_round: int = Field(ge=1)
    experiment: Experiment
    """Holds the privacy plan of the WHOLE run: constants, local steps per round, rounds."""
    precision: Literal["float32", "bfloat16"]
    """Decided once per run, so that a resumed run repeats the same arithmetic."""
    manifest: Manifest
    """Trainable tensors, in `weights`; the update comes back in the same order."""
    base_manifest: Manifest = Manifest(tensors=())
    """Frozen tensors."""
    base_digest: str = Field("", pattern=r"^([0-9a-f]{64})?$")
    """SHA-256 of the packed frozen tensors (float32); empty when nothing is frozen."""


class ReplyHeader(Section):
    """What a site answers, besides the update. Every field is on the release list in client/README.md."""

    schema_version: Literal[1] = 1
    request_digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    status: Literal["trained", "refused"]
    refusal: RefusalCode | None = None
    reason: str = Field("", max_length=500)
    """One line for the coordinator's operator; never a path, a file name or anything computed from images."""
    num_examples: int = Field(1, ge=0, le=2**53)
    """1 unless the policy releases image counts."""
    scalars: dict[str, float] = Field(default_factory=dict, max_length=32)
    epsilon: float | None = Field(None, ge=0, allow_inf_nan=False)
    """Spent so far on this data set in all runs; None where no bound exists. Of the DP part alone if `is_unbounded`."""
    delta: float | None = Field(None, gt=0, lt=1)
    """At which epsilon holds: the site's own."""
    is_unbounded: bool = False
    """A release without DP was made: no epsilon holds for the whole."""
    epsilon_cap: float | None = Field(None, ge=0)
    unit: Literal["image", "person"] | None = None
    ledger_sequence: int | None = Field(None, ge=0)
    ledger_hash: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if (self.status == "refused") != (self.refusal is not None):
            raise ValueError("a refusal carries its code, and nothing else does")
        if any(not math.isfinite(value) for value in self.scalars.values()):
            raise ValueError("scalars are finite")
        return self


class TrainRequest:
    """One request: header, trainable weights and, when the site lacks them, frozen weights (flat float32)."""

    def __init__(
        self, header: RequestHeader, weights: NDArray[np.float32], base: NDArray[np.float32] | None = None
    ) -> None:
        self.header, self.weights, self.base = header, weights, base

    def to_record(self) -> RecordDict:
        """The Flower content; built once per round and shared by all messages, so that it is uploaded once."""
        dtype = self.header.experiment.federation.wire_dtype
        arrays = {"weights": Array(encode(self.weights, dtype))}
        if self.base is not None:
            arrays["base"] = Array(encode(self.base, "float32"))
        return RecordDict({"arrays": ArrayRecord(arrays), "header": header_record(self.header)})

    @classmethod
    def from_record(cls, content: RecordDict) -> "TrainRequest":
        """Parse and check everything the header promises.

        Raises:
            MessageError: unknown schema, unknown keys, missing or misshapen arrays, hostile sizes.
        """
        header = validated(RequestHeader, read_header(content))
        dtype = header.experiment.federation.wire_dtype
        weights = decode(read_array(content, "weights", header.manifest.num_elements), dtype)
        base = None
        if "base" in content.array_records["arrays"]:
            base = decode(read_array(content, "base", header.base_manifest.num_elements), "float32")
            if array_digest(base) != header.base_digest:
                raise MessageError("the frozen tensors do not have the digest that the header names: send them again")
        return cls(header, weights, base)

    @property
    def digest(self) -> str:
        """SHA-256 over header and trainable weights: the same request asked again has the same digest."""
        hasher = hashlib.sha256(canonical_json(self.header.model_dump(mode="json")))
        hasher.update(np.ascontiguousarray(self.weights).data)
        return hasher.hexdigest()


class TrainReply:
    """One reply: header and, when trained, the wire form of the update (weights after minus weights before)."""

    def __init__(self, header: ReplyHeader, update: NDArray[Any] | None = None) -> None:
        self.header, self.update = header, update

    def to_record(self) -> RecordDict:
        """The Flower content."""
        arrays = {} if self.update is None else {"update": Array(self.update)}
        return RecordDict({"arrays": ArrayRecord(arrays), "header": header_record(self.header)})

    @classmethod
    def from_record(cls, content: RecordDict, num_elements: int) -> "TrainReply":
        """Parse a reply; the update is left in wire form and is popped from `content`, so that it can be freed.

        Raises:
            MessageError: unknown schema or keys, or an update whose length is not `num_elements`.
        """
        header = validated(ReplyHeader, read_header(content))
        if header.status == "refused":
            return cls(header)
        update = read_array(content, "update", num_elements)
        content.array_records["arrays"].pop("update")
        return cls(header, update)


def canonical_json(value: Any) -> bytes:  # noqa: ANN401  # any JSON value
    """One byte string per value: sorted keys, no spaces; what digests and hash chains are computed from."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def array_digest(flat: NDArray[np.float32]) -> str:
    """SHA-256 of a flat float32 array, hexadecimal."""
    return hashlib.sha256(np.ascontiguousarray(flat, np.float32).data).hexdigest()


def experiment_digest(experiment: Experiment) -> str:
    """SHA-256 of the resolved experiment: what a site approves and what fixes the plan of a run."""
    return hashlib.sha256(canonical_json(experiment.model_dump(mode="json"))).hexdigest()


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
    if not isinstance(text, str) or len(text) > MAX_HEADER_BYTES:
        raise MessageError(f"message header is not text of at most {MAX_HEADER_BYTES} bytes")
    try:
        return _checked(json.loads(text))
    except json.JSONDecodeError as error:
        raise MessageError("message header is not JSON") from error


def _checked(header: Any) -> Any:  # noqa: ANN401  # JSON
    version = header.get("schema_version") if isinstance(header, dict) else None
    if version != SCHEMA_VERSION:
        raise MessageError(f"message schema {version!r}, this side speaks {SCHEMA_VERSION}: install the same version")
    return header


def read_array(content: RecordDict, name: str, num_elements: int) -> NDArray[Any]:
    """A flat array of a message.

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
    if len(array.data) > num_elements * 4 + 1024:
        raise MessageError(f"array {name!r} carries {len(array.data)} bytes for {num_elements} elements")
    try:
        value: NDArray[Any] = array.numpy()
    except (ValueError, TypeError, EOFError, OSError, MemoryError) as error:
        raise MessageError(f"array {name!r} cannot be read") from error
    if value.shape != (num_elements,):
        raise MessageError(f"array {name!r} holds shape {value.shape}, agreed was ({num_elements},)")
    return value


def validated(model: type[Header], header: Any) -> Header:  # noqa: ANN401  # JSON
    """The header as `model`.

    Raises:
        MessageError: unknown keys or values out of range.
    """
    try:
        return model.model_validate(header)
    except ValidationError as error:
        raise MessageError(f"message header: {explain(error)}") from error
