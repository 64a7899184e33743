"""What a coordinator asks of a site's audits, and how a site answers: headers of the messages. No flwr.

The model under audit travels with the question, as one packed array of its averaged weights; so do the public models
that the membership attack is calibrated with, packed by the same manifest.
"""

import hashlib
from typing import Literal, Self

from pydantic import Field, model_validator

from shared.errors import InputError
from shared.experiment.config import Experiment, Section
from shared.messages.envelope import canonical_json
from shared.messages.packing import Manifest
from shared.messages.text import Line
from shared.messages.training import RefusalCode

AuditKind = Literal["membership", "memorisation"]
AUDIT_ACTION = "audit"
"""Routes the message to its handler: the message type is `query.audit`."""
MODEL_ARRAY = "model"
MOST_REFERENCES = 4
PIXELS = "pixels"
"""The feature space of the copy test that needs no network."""
MOST_AUDIT_IMAGES = 10_000
MAX_EXTRACTOR = 200
FEATURE_SPACE = "feature_space"
FigureName = Literal[
    "auc",
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
    "feature_space",
]
"""Every figure that an audit may release; all are numbers but `feature_space`, a name."""
LARGEST_FIGURE: dict[str, float] = {"threshold": 1e6, "num_images": float(MOST_AUDIT_IMAGES)}
"""Of the figures that are no share, rate or AUC: those are at most 1."""
MIN_HELD_OUT = 100
"""Held-out images below which a rate of 1 percent cannot be measured."""


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
    """One question to the sites; the arrays `model`, `reference-0`, ... come with it."""

    schema_version: Literal[1] = 1
    run: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    """Name of the question."""
    checkpoint: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    checkpoint_digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    """As the coordinator names the model; verdicts carry it."""
    experiment: Experiment
    """Geometry and schedule, the sampler of the copy test, the limits of `[release]`."""
    manifest: Manifest
    """Order and shapes of the tensors, in all arrays."""
    model_digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    """SHA-256 of the packed averaged weights."""
    reference_digests: tuple[str, ...] = Field(min_length=1, max_length=MOST_REFERENCES)
    """SHA-256 of each reference's packed weights."""
    extractor: str = Field(PIXELS, max_length=MAX_EXTRACTOR)
    """Feature space of the copy test."""
    extractor_sha256: str = Field("", pattern=r"^([0-9a-f]{64})?$")
    """Of the feature network; empty for `pixels`."""
    num_images: int = Field(1000, ge=1, le=MOST_AUDIT_IMAGES)
    """Generated images of the copy test."""
    control_steps: int = Field(1000, ge=1)
    """Training of the control model."""
    figures: bool = False
    """Ask for the figures too, which are a release without DP."""

    @property
    def digest(self) -> str:
        """SHA-256 of the question; through the digests in it, of the arrays too."""
        return hashlib.sha256(canonical_json(self.model_dump(mode="json"))).hexdigest()

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.model_digest in self.reference_digests:
            raise ValueError("a reference is the audited model itself: the attack would find nothing in any model")
        return self


class AuditVerdict(Section):
    """Outcome of one audit, as it may leave a site."""

    audit: AuditKind
    passed: bool
    reason: Line = ""
    """Why it failed, in fixed words; empty when it passed."""
    figures: dict[FigureName, float | Line] = Field(default_factory=dict)
    """Empty unless the policy lets them go."""

    @model_validator(mode="after")
    def _in_range(self) -> Self:
        for name, value in self.figures.items():
            if name == FEATURE_SPACE:
                if not isinstance(value, str) or len(value) > MAX_EXTRACTOR:
                    raise ValueError(f"{name} is a name of at most {MAX_EXTRACTOR} characters")
            elif not isinstance(value, float) or not 0 <= value <= LARGEST_FIGURE.get(name, 1.0):
                raise ValueError(f"{name} is a number from 0 to {LARGEST_FIGURE.get(name, 1.0):g}")
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
