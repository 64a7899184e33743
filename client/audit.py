"""Audits that a site runs on a model with its own images: membership inference and memorisation.

Everything stays in the site's home. What may leave is the verdict, pass or fail; figures leave only as a charged
release, see `verdicts.py`.
"""

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from client.dataset import Dataset, open_dataset
from client.settings import Home, SiteConfig, private_files, write_private
from client.verdicts import Verdict
from shared.checkpoint import resolve_checkpoint
from shared.config import Experiment
from shared.engine import Engine
from shared.errors import InputError
from shared.extractor import Extractor
from shared.features import load_extractor
from shared.imageset import ImageCache
from shared.membership import AttackResult, attack
from shared.memorisation import CopyResult, copies, features_of, pixel_features
from shared.sampling import LoadedModel, grid_png, load_model, sample_images
from shared.seeding import Streams

MIN_OTHERS = 100
"""Held-out images below which a rate of 1 percent cannot be measured."""
MAX_MEMBERS = 2000
CONTROL_IMAGES = 32
"""The control is trained to know this many images by heart."""
PIXELS = "pixels"


@dataclass(frozen=True)
class AuditOptions:
    """What is audited, and with what.

    Attributes:
        checkpoint: the model, a checkpoint folder or run directory.
        references: models that never saw this site's images; the public pre-trained one, and the same after a short
            fine-tuning on public images.
        extractor: feature space of the copy test: `pixels`, or a name of `shared.features`.
        num_images: generated images of the copy test.
        control_steps: optimizer steps of the control model.
        overrides: changes to the checkpoint's experiment, e.g. a faster sampler.
        device: where networks run.
        on_stage: told what is being done.
    """

    checkpoint: Path
    references: tuple[Path, ...]
    extractor: str = PIXELS
    num_images: int = 1000
    control_steps: int = 1000
    overrides: tuple[str, ...] = ()
    device: str = "cpu"
    on_stage: Callable[[str], None] = lambda _: None


def audit(home: Home, settings: SiteConfig, options: AuditOptions) -> list[Verdict]:
    """Run both audits on this site's images and keep figures and contact sheet in the home, 0600.

    Raises:
        InputError: images not scanned at the model's size, too few held out, no reference, bad checkpoint.
    """
    if not options.references:
        raise InputError("audit without --reference: give the public checkpoint that the model was fine-tuned from")
    checkpoint = resolve_checkpoint(options.checkpoint)
    loaded = load_model(checkpoint, device=options.device, overrides=options.overrides)
    references = [_reference(path, loaded, options.device) for path in options.references]
    data = open_dataset(home, loaded.experiment.model.image_size)
    if len(data.held_out) < MIN_OTHERS:
        raise InputError(
            f"{len(data.held_out)} held-out images, an audit needs {MIN_OTHERS}: raise held_out_ratio before the first "
            "round"
        )
    extractor = None if options.extractor == PIXELS else load_extractor(options.extractor, device=options.device)
    options.on_stage("membership attacks")
    members, others = _some(data.images, data.train), _some(data.images, data.held_out)
    attacks = attack(loaded.model, references, loaded.experiment, members, others)
    options.on_stage(f"control model, {options.control_steps} steps")
    control = control_attack(references[0], references, loaded.experiment, members, others, options.control_steps)
    options.on_stage("copies among generated images")
    generated = sample_images(loaded.model, loaded.experiment, range(options.num_images), 64, options.device)
    copied = _copies(generated, data, extractor)
    verdicts = [
        _membership_verdict(settings.alias, checkpoint.name, loaded, attacks, control),
        _memorisation_verdict(settings.alias, checkpoint.name, loaded, copied, options),
    ]
    _keep(home, verdicts, copied, generated, data)
    return verdicts


def control_attack(
    start: nn.Module,
    references: list[nn.Module],
    experiment: Experiment,
    members: Tensor,
    others: Tensor,
    steps: int,
) -> AttackResult:
    """The same attack on a model that has learned a few of the images by heart: it must find them.

    A null result on the audited model says something only if the attack works here.
    """
    few = members[:CONTROL_IMAGES]
    tree = experiment.model_dump()
    tree["train"] |= {"batch": min(32, len(few)), "objective": "dsm", "accumulation": 1}
    tree["mask"] |= {"kind": "none", "ratio": 0.0}
    tree["optim"] |= {"lr": 5e-4, "warmup_steps": 0, "grad_clip": 1.0}
    tree["privacy"] |= {"mechanism": "none"}
    tree["data"] |= {"horizontal_flip": False}
    chosen = Experiment.model_validate(tree)
    engine = Engine(chosen, deepcopy(start).train(), Streams(0, ("control",)))
    order = np.random.default_rng(0)
    for _ in range(steps):
        rows = order.choice(len(few), chosen.train.batch, replace=False)
        engine.step(few[rows].to(engine.device))
    return attack(engine.model.eval(), references, chosen, few, others)["calibrated"]


def _reference(path: Path, loaded: LoadedModel, device: str) -> nn.Module:
    reference = load_model(resolve_checkpoint(path), device=device)
    ours, theirs = loaded.experiment, reference.experiment
    if ours.model != theirs.model or ours.data.wavelet != theirs.data.wavelet or ours.diffusion != theirs.diffusion:
        raise InputError(f"reference {path}: another network or schedule than the audited model's: give its own start")
    return reference.model


def _some(images: ImageCache, rows: np.ndarray[Any, np.dtype[np.int64]]) -> Tensor:
    """At most `MAX_MEMBERS` of the rows, always the same ones."""
    chosen = np.random.default_rng(0).permutation(rows)[:MAX_MEMBERS]
    return images.batch(chosen)


def _copies(generated: Tensor, data: Dataset, extractor: Extractor | None) -> CopyResult:
    compute = pixel_features if extractor is None else extractor
    training = features_of(compute, data.images.batch(data.train))
    held_out = features_of(compute, data.images.batch(data.held_out))
    persons = None if data.persons is None else data.persons[data.held_out]
    return copies(features_of(compute, generated), training, held_out, persons)


def _membership_verdict(
    site: str, checkpoint: str, loaded: LoadedModel, attacks: dict[str, AttackResult], control: AttackResult
) -> Verdict:
    config, found = loaded.experiment.release, attacks["calibrated"]
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
    return Verdict(site, "membership", checkpoint, loaded.meta.digest, not reason, reason, figures)


def _memorisation_verdict(
    site: str, checkpoint: str, loaded: LoadedModel, found: CopyResult, options: AuditOptions
) -> Verdict:
    passed = found.copy_rate <= loaded.experiment.release.max_copy_rate
    figures = {
        "copy_rate": found.copy_rate,
        "false_positive_rate": found.false_positive_rate,
        "authenticity": found.authenticity,
        "threshold": found.threshold,
        "num_images": options.num_images,
        "feature_space": options.extractor,
    }
    reason = "" if passed else "generated images are copies of training images"
    return Verdict(site, "memorisation", checkpoint, loaded.meta.digest, passed, reason, figures)


def _keep(home: Home, verdicts: list[Verdict], found: CopyResult, generated: Tensor, data: Dataset) -> None:
    folder, name = home.path / "audits", verdicts[0].checkpoint_digest[:16]
    with private_files():
        folder.mkdir(parents=True, exist_ok=True)
        figures = [verdict.as_json(with_figures=True) for verdict in verdicts]
        write_private(folder / f"{name}.json", json.dumps(figures, indent=2).encode())
        pairs = [(generated[one], data.images.batch(data.train[[other]])[0]) for one, other in found.closest]
        sheet = torch.stack([image for pair in pairs for image in pair])
        write_private(folder / f"{name}-closest.png", grid_png(sheet, columns=8))
