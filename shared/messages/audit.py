"""What a coordinator asks of a site's audits, and how a site answers: headers of the messages. No flwr.

The model under audit travels with the question, as one packed array of its averaged weights; so do the public models
that the site compares it with, packed by the same manifest. Thresholds, noise and lengths are the site's.
"""

import hashlib
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from shared.errors import InputError
from shared.experiment.config import Experiment, Section
from shared.messages.packing import Manifest
from shared.messages.text import Line
from shared.messages.training import RefusalCode
from shared.storage.files import canonical_json

AuditKind = Literal["membership", "memorisation", "canaries"]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
AUDIT_ACTION = "audit"
"""Routes the message to its handler: the message type is `query.audit`."""
MODEL_ARRAY = "model"
MOST_REFERENCES = 4
PIXELS = "pixels"
"""The feature space of the copy test that needs no network."""
FigureName = Literal[
    "auc",
    "copied",
    "noise_multiplier",
    "epsilon",
    "epsilon_at_least",
    "auc_low",
    "auc_high",
    "tpr_at_1_percent_fpr",
    "tpr_low",
    "tpr_high",
    "loss_auc",
    "pia_auc",
    "control_auc",
    "control_auc_low",
    "copy_rate",
    "false_positive_rate",
    "authenticity",
    "threshold",
    "num_images",
]
"""Every figure that an audit may release: of counts with noise, of canaries, and the exact ones of an operator."""
LARGEST_FIGURE: dict[str, float] = dict.fromkeys(
    ("noise_multiplier", "epsilon", "epsilon_at_least", "threshold", "num_images"), 1e6
)
"""Of the figures that are no share, rate or AUC: those are at most 1."""
SMALLEST_FIGURE: dict[str, float] = {"copied": -1.0}
"""Of the one that is a difference of shares: all others are at least 0."""


def reference_array(number: int) -> str:
    """Name of the array that holds a reference model's weights."""
    return f"reference-{number}"


def check_reference(name: object, ours: Experiment, theirs: Experiment) -> None:
    """Refuse a reference whose losses could not be compared.

    Raises:
        InputError: another network, wavelet or schedule.
    """
    if ours.model != theirs.model or ours.data.wavelet != theirs.data.wavelet or ours.diffusion != theirs.diffusion:
        raise InputError(f"reference {name}: another network or schedule than the audited model's: give its own start")


class AuditQuery(Section):
    """One question to the sites: which model. How it is audited is the sites' policy.

    For `counts` the arrays `model`, `reference-0`, ... come with it; for `canaries` nothing does, the site attacks its
    own DP-SGD at the plan's constants.
    """

    schema_version: Literal[1] = 1
    run: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    """Name of the question."""
    audited_run: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    """The training run whose model is audited."""
    checkpoint: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    checkpoint_digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    """As the coordinator names the model; verdicts carry it."""
    evidence: Literal["counts", "canaries"] = "counts"
    experiment: Experiment
    """Geometry, schedule and sampler of the model; the plan that canaries are trained by."""
    manifest: Manifest = Manifest(tensors=())
    """Order and shapes of the tensors, in all arrays."""
    model_digest: str = Field("", pattern=r"^([0-9a-f]{64})?$")
    """SHA-256 of the packed averaged weights."""
    reference_digests: tuple[Digest, ...] = Field((), max_length=MOST_REFERENCES)
    """SHA-256 of each reference's packed weights."""

    @property
    def digest(self) -> str:
        """SHA-256 of the question; through the digests in it, of the arrays too."""
        return hashlib.sha256(canonical_json(self.model_dump(mode="json"))).hexdigest()

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.model_digest in self.reference_digests:
            raise ValueError("a reference is the audited model itself: the attack would find nothing in any model")
        if (self.evidence == "counts") != bool(self.model_digest and self.reference_digests):
            raise ValueError("counts need a model and a reference, canaries have none")
        return self


class AuditVerdict(Section):
    """Outcome of one audit, as it may leave a site."""

    audit: AuditKind
    passed: bool
    reason: Line = ""
    """Why it failed, in fixed words; empty when it passed."""
    figures: dict[FigureName, Annotated[float, Field(strict=True)]] = Field(default_factory=dict)
    """Of noisy counts or canaries; exact ones only where a site's operator has released them."""

    @model_validator(mode="after")
    def _in_range(self) -> Self:
        for name, value in self.figures.items():
            low, high = SMALLEST_FIGURE.get(name, 0.0), LARGEST_FIGURE.get(name, 1.0)
            if not low <= value <= high:
                raise ValueError(f"{name} is a number from {low:g} to {high:g}")
        return self


class AuditAnswer(Section):
    """A site's answer."""

    schema_version: Literal[1] = 1
    status: Literal["audited", "refused"]
    refusal: RefusalCode | None = None
    reason: Line = ""
    """Of a refusal; fixed text and policy numbers, nothing computed from images."""
    verdicts: tuple[AuditVerdict, ...] = Field((), max_length=8)

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if (self.status == "refused") != (self.refusal is not None) or (self.status == "audited") != bool(
            self.verdicts
        ):
            raise ValueError("an answer has verdicts, or a refusal with its code")
        if len({verdict.audit for verdict in self.verdicts}) < len(self.verdicts):
            raise ValueError("one verdict per audit")
        return self
