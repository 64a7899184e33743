"""What an audit question holds: the model, and public references that saw no site's images.

No torch but for the reference that is made here.
"""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from shared.errors import InputError
from shared.experiment.config import Experiment, explain
from shared.messages.audit import MODEL_ARRAY, AuditQuery, check_reference, reference_array
from shared.messages.packing import Manifest, array_digest, pack
from shared.storage.checkpoint import check_files, load_group, resolve_checkpoint

DEADLINE_SECONDS = 4 * 3600.0
Flat = NDArray[np.float32]


@dataclass(frozen=True)
class AuditPlan:
    """What the operator asks for.

    Attributes:
        references: public checkpoints that saw no site's images; the model's start first.
        public: public images on which the first reference is fine-tuned to be one more; empty: none.
        public_steps: length of that fine-tuning.
        canaries: ask for the canary audit of each site's DP-SGD instead; needs no reference.
        sites: aliases to ask; empty: those that took part in the checkpoint's rounds, or everybody for another one.
        deadline_seconds: for the answers.
    """

    references: tuple[Path, ...] = ()
    public: str = ""
    public_steps: int = 500
    canaries: bool = False
    sites: tuple[str, ...] = ()
    deadline_seconds: float = DEADLINE_SECONDS


@dataclass(frozen=True)
class AuditQuestion:
    """A question ready to be sent: its header, and the arrays by name."""

    query: AuditQuery
    arrays: dict[str, Flat] = field(repr=False)


def make_question(checkpoint: Path, plan: AuditPlan, audited_run: str) -> AuditQuestion:
    """Header and arrays of a question.

    Raises:
        InputError: no averaged weights, no reference, or one of another geometry or the model itself.
    """
    meta = check_files(checkpoint)
    fields: dict[str, object] = {
        "run": f"audit-{datetime.now(UTC):%Y%m%d-%H%M%S}",
        "audited_run": audited_run,
        "checkpoint": checkpoint.name,
        "checkpoint_digest": meta.digest,
        "experiment": meta.experiment,
        "evidence": "canaries" if plan.canaries else "counts",
    }
    arrays: dict[str, Flat] = {}
    if not plan.canaries:
        manifest, arrays = _arrays(checkpoint, plan, meta.experiment)
        digests = {name: array_digest(flat) for name, flat in arrays.items()}
        fields |= {"manifest": manifest, "model_digest": digests.pop(MODEL_ARRAY)}
        fields["reference_digests"] = tuple(digests.values())
    try:
        return AuditQuestion(AuditQuery.model_validate(fields), arrays)
    except ValidationError as error:
        raise InputError(f"audit: {explain(error)}") from error


def _arrays(checkpoint: Path, plan: AuditPlan, experiment: Experiment) -> tuple[Manifest, dict[str, Flat]]:
    """The model's averaged weights and those of its references, packed by one manifest."""
    if not plan.references:
        raise InputError("audit without --reference: give the public checkpoint that the model was fine-tuned from")
    tensors = _averaged(checkpoint)
    manifest, references = Manifest.of(tensors), []
    for path in plan.references:
        folder = resolve_checkpoint(path)
        check_reference(path, experiment, check_files(folder).experiment)
        references.append(pack(_averaged(folder), manifest))
    if plan.public:
        references.append(pack(_tuned(plan), manifest))
    packed = {reference_array(number): flat for number, flat in enumerate(references)}
    return manifest, {MODEL_ARRAY: pack(tensors, manifest), **packed}


def _averaged(checkpoint: Path) -> dict[str, Flat]:
    if "ema.safetensors" not in check_files(checkpoint).sha256:
        raise InputError(f"checkpoint {checkpoint} has no EMA weights: only the moving average is audited and released")
    return {name: np.asarray(array, np.float32) for name, array in load_group(checkpoint, "ema").items()}


def _tuned(plan: AuditPlan) -> dict[str, Flat]:
    """The first reference after a short fine-tuning on public images."""
    from shared.audits.reference_model import retrained
    from shared.data.image_cache import open_images
    from shared.evaluation.generate import load_model

    start = load_model(resolve_checkpoint(plan.references[0]))
    images = open_images(plan.public, start.experiment.model.image_size)
    model = retrained(start.model, start.experiment, images, plan.public_steps)
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}
