"""What a round sends: typed headers, and tensors packed into a few flat arrays.

Every array costs Flower two HTTP objects, so a model travels as one array of its trainable tensors, and as a second one
of its frozen tensors to a site that does not hold them yet. Headers are JSON in a ConfigRecord; nothing is pickled.
No torch: the ServerApp and a site that refuses never load it.
"""

import hashlib
from functools import cached_property
from typing import Any, Literal, Self

import numpy as np
from flwr.app import Array, ArrayRecord, RecordDict
from numpy.typing import NDArray
from pydantic import Field, model_validator

from shared.experiment.config import Experiment, Section
from shared.messages.envelope import header_record, read_array, read_header, validated
from shared.messages.packing import Manifest, MessageError, array_digest, decode, encode
from shared.messages.text import Epsilon, Figure, Line
from shared.secure_aggregation.dealing import Dealing
from shared.secure_aggregation.roster import Roster
from shared.storage.files import canonical_json

RefusalCode = Literal[
    "schema",
    "malformed",
    "not_signed",
    "replayed",
    "experiment_not_approved",
    "code_not_approved",
    "task_not_allowed",
    "dp_required",
    "non_private_forbidden",
    "unit_mismatch",
    "noise_too_small",
    "too_many_steps",
    "too_many_rounds",
    "too_many_offers",
    "budget_exceeded",
    "plan_changed",
    "out_of_range",
    "policy",
    "data_not_ready",
    "ledger_damaged",
    "ledger_busy",
    "base_missing",
    "roster_not_approved",
    "secure_sum",
    "disk_full",
    "clock",
    "failed",
]
"""Why a site said no; `base_missing` asks for the frozen tensors, `policy` keeps its reason for the site's operator,
`secure_sum` is said of what a round asks of its masked sum, `failed` is an error of the site's own training."""
ScalarName = Literal["loss", "grad_norm", "seconds"]
"""What a site may release of a round, by policy."""


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
    roster: Roster | None = None
    """Whose updates the round adds up; None where it sees them, and in offers, which come before the roster."""


class ReplyHeader(Section):
    """What a site answers, besides the update. Every field is on the release list in client/README.md."""

    schema_version: Literal[1] = 1
    request_digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    status: Literal["trained", "refused"]
    refusal: RefusalCode | None = None
    reason: Line = ""
    """One line for the coordinator's operator; never a path, a file name or anything computed from images."""
    num_examples: int = Field(1, ge=0, le=2**53)
    """1 unless the policy releases image counts."""
    scalars: dict[ScalarName, Figure] = Field(default_factory=dict)
    epsilon: Epsilon | None = None
    """Of all that was charged to the site's ledger in all runs; None where no bound exists. Of the DP part alone if
    `is_unbounded`. Whether data sets share records, and what was spent elsewhere, is not in it."""
    delta: float | None = Field(None, gt=0, lt=1)
    """At which epsilon holds: the site's own."""
    is_unbounded: bool = False
    """A release without DP was made: no epsilon holds for the whole."""
    epsilon_cap: Epsilon | None = None
    unit: Literal["image", "person"] | None = None
    ledger_sequence: int | None = Field(None, ge=0, lt=2**63)
    """Charges and completed charges of the site's ledger; entries of other kinds are not counted."""
    ledger_hash: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")
    """Of its newest entry."""
    dealing: Dealing | None = None
    """Sealed shares of the round's masks, with a masked update."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if (self.status == "refused") != (self.refusal is not None):
            raise ValueError("a refusal carries its code, and nothing else does")
        return self


class TrainRequest:
    """One request: header, trainable weights and, when the site lacks them, frozen weights (flat float32)."""

    def __init__(
        self, header: RequestHeader, weights: NDArray[np.float32], base: NDArray[np.float32] | None = None
    ) -> None:
        self.header, self.weights, self.base = header, weights, base

    def to_record(self) -> RecordDict:
        """The Flower content; built once per round and shared by all messages, so that it is uploaded once."""
        dtype = self.header.experiment.federation.weights_dtype
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
        dtype = header.experiment.federation.weights_dtype
        weights = decode(read_array(content, "weights", header.manifest.num_elements), dtype)
        base = None
        if "base" in content.array_records["arrays"]:
            base = decode(read_array(content, "base", header.base_manifest.num_elements), "float32")
            if array_digest(base) != header.base_digest:
                raise MessageError("the frozen tensors do not have the digest that the header names: send them again")
        return cls(header, weights, base)

    @cached_property
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
    def from_record(cls, content: RecordDict, length: int, item_bytes: int = 4) -> "TrainReply":
        """Parse a reply; the update is left in wire form and is popped from `content`, so that it can be freed.

        Args:
            content: of the message.
            length: of the update's array, as agreed.
            item_bytes: most bytes of one item: 8 for updates that 64-bit masks hide.

        Raises:
            MessageError: unknown schema or keys, or an update of another length.
        """
        header = validated(ReplyHeader, read_header(content))
        if header.status == "refused":
            return cls(header)
        update = read_array(content, "update", length, item_bytes)
        content.array_records["arrays"].pop("update")
        return cls(header, update)


def experiment_digest(experiment: Experiment) -> str:
    """SHA-256 of the resolved experiment: what a site approves and what fixes the plan of a run."""
    return hashlib.sha256(canonical_json(experiment.model_dump(mode="json"))).hexdigest()
