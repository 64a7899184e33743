"""Audits that a site runs on a model with its own images: membership inference and memorisation.

Everything stays in the site's home, for its operator: this look is free. What may leave is a charged release of noisy
counts (`audit_counts.py`), or these figures, charged as a release without DP (`verdicts.py`).
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from client.answers.audit_power import too_few
from client.answers.audited_model import Subject
from client.answers.verdicts import Verdict
from client.data.dataset import Dataset, open_dataset
from client.home import Home
from client.private_files import private_files, write_private
from client.settings import SiteConfig
from shared.audits.membership_attack import AttackResult, attack
from shared.audits.memorisation import CopyResult, copies, pixel_features, views_of
from shared.audits.reference_model import retrained
from shared.data.image_set import ImageCache
from shared.errors import InputError
from shared.evaluation.extractor import Extractor
from shared.evaluation.generate import grid_png, sample_images
from shared.storage.synthetic_mark import SyntheticMark

BATCH = 64
MAX_MEMBERS = 2000
CONTROL_IMAGES = 32
"""The control is trained to know this many images by heart."""


@dataclass(frozen=True)
class AuditOptions:
    """How a model is audited.

    Attributes:
        extractor: feature space of the copy test; None: pixels.
        num_images: generated images of the copy test.
        control_steps: optimizer steps of the control model.
        on_stage: told what is being done.
    """

    extractor: Extractor | None = None
    num_images: int = 1000
    control_steps: int = 1000
    on_stage: Callable[[str], None] = lambda _: None


def audit(home: Home, settings: SiteConfig, subject: Subject, options: AuditOptions) -> list[Verdict]:
    """Run both audits on this site's images and keep figures and contact sheet in the home, 0600.

    Raises:
        InputError: images not scanned at the model's size, or too few held out.
    """
    data = open_dataset(home, subject.experiment.model.image_size)
    if problem := too_few(data, "image", settings.policy.audit, has_noise=False):
        raise InputError(problem)
    device = next(subject.model.parameters()).device
    options.on_stage("membership attacks")
    members, others = _some(data.images, data.train), _some(data.images, data.held_out)
    attacks = attack(subject.model, subject.references, subject.experiment, members, others)
    options.on_stage(f"control model, {options.control_steps} steps")
    control = control_attack(subject, members, others, options.control_steps)
    options.on_stage("copies among generated images")
    generated = sample_images(subject.model, subject.experiment, range(options.num_images), BATCH, device)
    copied = _copies(generated, data, options.extractor, is_mirrored=subject.experiment.data.horizontal_flip)
    verdicts = [
        _membership_verdict(settings.alias, subject, attacks, control),
        _memorisation_verdict(settings.alias, subject, copied, options),
    ]
    _keep(home, verdicts, copied, generated, data)
    return verdicts


def control_attack(subject: Subject, members: Tensor, others: Tensor, steps: int) -> AttackResult:
    """The same attack on a copy of the first reference that has learned a few images by heart: it must find them.

    A null result on the audited model says something only if the attack works here.
    """
    few = members[:CONTROL_IMAGES]
    images = ImageCache(few.numpy, len(few), few.shape[-1])
    model = retrained(subject.references[0], subject.experiment, images, steps, lr=5e-4, grad_clip=1.0, ema_decay=0.0)
    return attack(model, subject.references, subject.experiment, few, others)["calibrated"]


def _some(images: ImageCache, rows: np.ndarray[Any, np.dtype[np.int64]]) -> Tensor:
    """At most `MAX_MEMBERS` of the rows, always the same ones."""
    chosen = np.random.default_rng(0).permutation(rows)[:MAX_MEMBERS]
    return images.batch(chosen)


def _copies(generated: Tensor, data: Dataset, extractor: Extractor | None, *, is_mirrored: bool) -> CopyResult:
    compute = pixel_features if extractor is None else extractor
    training, held_out = data.images.batch(data.train), data.images.batch(data.held_out)
    persons = None if data.persons is None else data.persons[data.held_out]
    views = [views_of(compute, images, is_mirrored=is_mirrored) for images in (generated, training, held_out)]
    return copies(views[0], views[1], views[2], persons)


def _membership_verdict(
    site: str, subject: Subject, attacks: dict[str, AttackResult], control: AttackResult
) -> Verdict:
    config, found = subject.experiment.release, attacks["calibrated"]
    # The attack works when it surely finds more in the control than the limit allows in the model.
    is_working = control.auc_interval[0] > config.max_auc
    is_hidden = found.auc <= config.max_auc and found.tpr <= config.max_tpr
    reason = "" if is_working and is_hidden else "members can be told from others" if is_working else (
        "inconclusive: the attack does not find the images of its control model"
    )  # fmt: skip
    figures = {
        "auc": found.auc,
        "auc_low": found.auc_interval[0],
        "auc_high": found.auc_interval[1],
        "tpr_at_1_percent_fpr": found.tpr,
        "tpr_low": found.tpr_interval[0],
        "tpr_high": found.tpr_interval[1],
        "loss_auc": attacks["loss"].auc,
        "pia_auc": attacks["pia"].auc,
        "control_auc": control.auc,
        "control_auc_low": control.auc_interval[0],
    }
    return Verdict(site, "membership", subject.checkpoint, subject.digest, not reason, reason, figures)


def _memorisation_verdict(site: str, subject: Subject, found: CopyResult, options: AuditOptions) -> Verdict:
    passed = found.copy_rate <= subject.experiment.release.max_copy_rate
    figures = {
        "copy_rate": found.copy_rate,
        "false_positive_rate": found.false_positive_rate,
        "authenticity": found.authenticity,
        "threshold": found.threshold,
        "num_images": float(options.num_images),
    }
    reason = "" if passed else "generated images are copies of training images"
    return Verdict(site, "memorisation", subject.checkpoint, subject.digest, passed, reason, figures)


def _keep(home: Home, verdicts: list[Verdict], found: CopyResult, generated: Tensor, data: Dataset) -> None:
    folder, name = home.path / "audits", verdicts[0].checkpoint_digest[:16]
    with private_files():
        folder.mkdir(parents=True, exist_ok=True)
        figures = [verdict.as_json() for verdict in verdicts]
        write_private(folder / f"{name}.json", json.dumps(figures, indent=2).encode())
        pairs = [(generated[one], data.images.batch(data.train[[other]])[0]) for one, other in found.closest]
        sheet = torch.stack([image for pair in pairs for image in pair])
        # Photographs of the site lie between the generated pictures, so the whole sheet is called a composite.
        mark = SyntheticMark(verdicts[0].checkpoint_digest, source_type="compositeWithTrainedAlgorithmicMedia")
        write_private(folder / f"{name}-closest.png", grid_png(sheet, 8, mark))
