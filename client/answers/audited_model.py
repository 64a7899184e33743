"""The model under audit and the public models that the attack is calibrated with: from files, or from a request."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from client.training.local_round import load_model as fill
from shared.audits.reference_model import retrained
from shared.data.image_cache import open_images
from shared.diffusion.uvit import build_model
from shared.errors import InputError
from shared.evaluation.generate import load_model
from shared.experiment.config import Experiment
from shared.messages.audit import AuditQuery, check_reference
from shared.messages.packing import unpack
from shared.storage.checkpoint import resolve_checkpoint


@dataclass(frozen=True)
class Subject:
    """A model under audit.

    Attributes:
        checkpoint: its folder's name.
        digest: of the checkpoint, as the release gate knows it.
        model: the averaged weights, in evaluation mode.
        experiment: geometry, schedule, sampler and the limits of `[release]`.
        references: networks of the same kind that never saw the site's images.
    """

    checkpoint: str
    digest: str
    model: nn.Module
    experiment: Experiment
    references: tuple[nn.Module, ...]


def subject_of(
    checkpoint: Path, references: Sequence[Path], *, device: torch.device | str, overrides: Sequence[str] = ()
) -> Subject:
    """The model of a checkpoint folder or run directory, with references from the same.

    Raises:
        InputError: no reference, a bad checkpoint, a reference of another geometry, or the model itself as one.
    """
    if not references:
        raise InputError("audit without --reference: give the public checkpoint that the model was fine-tuned from")
    folder = resolve_checkpoint(checkpoint)
    loaded = load_model(folder, device=device, overrides=overrides)
    models = []
    for path in references:
        other = load_model(resolve_checkpoint(path), device=device)
        check_reference(path, loaded.experiment, other.experiment)
        if other.meta.sha256["ema.safetensors"] == loaded.meta.sha256["ema.safetensors"]:
            raise InputError(f"reference {path} is the audited model itself: the attack would find nothing in any")
        models.append(other.model)
    return Subject(folder.name, loaded.meta.digest, loaded.model, loaded.experiment, tuple(models))


def subject_in(
    query: AuditQuery, model: NDArray[np.float32], references: Sequence[NDArray[np.float32]], device: torch.device
) -> Subject:
    """The model that came with a request.

    Args:
        query: header of the request.
        model: packed averaged weights, (num_elements,).
        references: packed weights of each reference.
        device: where the networks go.

    Raises:
        MessageError: the tensors are not those of the experiment's network, or not finite.
    """

    def network(flat: NDArray[np.float32]) -> nn.Module:
        tensors: Mapping[str, Any] = unpack(flat, query.manifest)
        filled = fill(build_model(query.experiment), {}, dict(tensors))
        return filled.to(device).eval().requires_grad_(False)

    others = tuple(network(flat) for flat in references)
    return Subject(query.checkpoint, query.checkpoint_digest, network(model), query.experiment, others)


def with_tuned_reference(subject: Subject, public: str, steps: int) -> Subject:
    """The subject with one more reference: its first one after a short DSM fine-tuning on public images.

    A masked-pretrained start has never denoised a whole image; tuned so, it predicts better what makes an image easy
    for every model.

    Args:
        subject: the model and its references.
        public: folder, zip, cache or `synthetic:SITE:N` of images that are no site's.
        steps: optimizer steps.

    Raises:
        InputError: no images there.
    """
    images = open_images(public, subject.experiment.model.image_size)
    tuned = retrained(subject.references[0], subject.experiment, images, steps)
    return replace(subject, references=(*subject.references, tuned))
