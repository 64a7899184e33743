"""What an audit question holds: the model, public references that saw no site's images, and how to look.

No torch but for the reference that is made here.
"""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from shared.errors import InputError
from shared.experiment.config import explain, parse_experiment
from shared.messages.audit import MODEL_ARRAY, PIXELS, AuditQuery, check_reference, reference_array
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
        extractor: feature space of the copy test.
        weights_file: of the extractor.
        num_images: generated images of the copy test.
        control_steps: training of the control model at the site.
        figures: ask for the figures too.
        overrides: changes to the checkpoint's experiment, e.g. a faster sampler.
        sites: aliases to ask; empty: those that took part in the checkpoint's rounds, or everybody for another one.
        deadline_seconds: for the answers.
    """

    references: tuple[Path, ...]
    public: str = ""
    public_steps: int = 500
    extractor: str = PIXELS
    weights_file: Path | None = None
    num_images: int = 1000
    control_steps: int = 1000
    figures: bool = False
    overrides: tuple[str, ...] = ()
    sites: tuple[str, ...] = ()
    deadline_seconds: float = DEADLINE_SECONDS


@dataclass(frozen=True)
class AuditQuestion:
    """A question ready to be sent: its header, and the arrays by name."""

    query: AuditQuery
    arrays: dict[str, Flat] = field(repr=False)


def make_question(checkpoint: Path, plan: AuditPlan) -> AuditQuestion:
    """Header and arrays of a question.

    Raises:
        InputError: no averaged weights, no reference, one of another geometry or the model itself, bad extractor.
    """
    if not plan.references:
        raise InputError("audit without --reference: give the public checkpoint that the model was fine-tuned from")
    meta = check_files(checkpoint)
    experiment = parse_experiment(meta.experiment.to_toml(), list(plan.overrides))
    tensors = _averaged(checkpoint)
    manifest = Manifest.of(tensors)
    references = []
    for path in plan.references:
        folder = resolve_checkpoint(path)
        check_reference(path, experiment, check_files(folder).experiment)
        references.append(pack(_averaged(folder), manifest))
    if plan.public:
        references.append(pack(_tuned(plan), manifest))
    digest = ""
    extractor = plan.extractor
    if extractor != PIXELS:
        from shared.evaluation.networks import load_extractor

        space = load_extractor(extractor, weights=plan.weights_file).space
        extractor, digest = space.extractor, space.sha256
    model = pack(tensors, manifest)
    fields = {
        "run": f"audit-{datetime.now(UTC):%Y%m%d-%H%M%S}",
        "checkpoint": checkpoint.name,
        "checkpoint_digest": meta.digest,
        "experiment": experiment,
        "manifest": manifest,
        "model_digest": array_digest(model),
        "reference_digests": tuple(array_digest(flat) for flat in references),
        "extractor": extractor,
        "extractor_sha256": digest,
        "num_images": plan.num_images,
        "control_steps": plan.control_steps,
        "figures": plan.figures,
    }
    try:
        query = AuditQuery.model_validate(fields)
    except ValidationError as error:
        raise InputError(f"audit: {explain(error)}") from error
    arrays = {reference_array(number): flat for number, flat in enumerate(references)}
    return AuditQuestion(query, {MODEL_ARRAY: model, **arrays})


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
