"""An audit that may leave the site: counts of units with Gaussian noise, and the verdict computed from them.

Each unit, trained on or held out, falls into one cell by a score that depends on this unit and on the networks alone:
the logarithm of its loss under the reference over that under the model, the largest of its images, between thresholds
of the site; or into the last cell when the model's samples copy it. One unit more or less changes one count by one, so
noise of deviation sigma on all counts is one step of the Gaussian mechanism (sigma, q = 1), for whatever weights come.
Everything after the noise is post-processing. Shapes: N images, J cells.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from client.answers.audit_power import Rows, num_cells, units_of
from client.answers.audited_model import Subject
from client.answers.verdicts import Verdict
from client.data.dataset import Dataset
from client.limits import AuditPolicy
from client.privacy.arithmetic import one_by_one
from client.privacy.grid_noise import noised
from client.settings import Unit
from shared.audits.membership_attack import TIMES, Scores, loss_scores, separation
from shared.audits.memorisation import Features, nearest_neighbours, pixel_features
from shared.audits.reference_model import retrained
from shared.data.image_set import ImageCache
from shared.data.synthetic import generate
from shared.evaluation.generate import sample_images

BATCH = 64
CONTROL_IMAGES, CONTROL_OTHERS = 32, 128
INCONCLUSIVE = "inconclusive: the attack does not find the images of its control model"
Counts = NDArray[np.float64]


@dataclass(frozen=True)
class NoisyCounts:
    """What leaves the mechanism: (J,) counts of trained and of held-out units, the last cell is that of copies."""

    members: Counts
    held_out: Counts

    @property
    def auc(self) -> float:
        """Area under the ROC curve of the cells, ties counted half, in [0, 1]."""
        below = np.cumsum(self.held_out) - self.held_out / 2
        return float(np.clip(self.members @ below / (_total(self.members) * _total(self.held_out)), 0, 1))

    @property
    def copied(self) -> float:
        """Share of the trained units that are copied, beyond the share of held-out units, in [0, 1]."""
        share = self.members[-1] / _total(self.members) - self.held_out[-1] / _total(self.held_out)
        return float(np.clip(share, 0, 1))


def counted_verdicts(site: str, subject: Subject, data: Dataset, unit: Unit, audit: AuditPolicy) -> list[Verdict]:
    """Both verdicts of one charged release; the caller has charged (audit.noise_multiplier, q = 1, one step)."""
    is_working = finds_control(subject, audit)
    samples = [_samples(model, subject, audit) for model in (subject.model, subject.references[0])]
    sides = (data.units(unit), units_of(data, data.held_out, unit))
    look = looker(subject, audit, samples, data.size)
    cells = [cells_of(look, data, units, audit) for units in sides]
    counts = add_noise(cells[0], cells[1], num_cells(audit), audit.noise_multiplier)
    # Noise may carry a share beyond its range, which no reader would take.
    auc, copied = (round(min(1.0, max(low, share)), 3) for low, share in ((0.0, counts.auc), (-1.0, counts.copied)))
    is_hidden = auc <= audit.max_auc
    reason = "" if is_working and is_hidden else "members can be told from others" if is_working else INCONCLUSIVE
    copies = "" if copied <= audit.max_copied else "generated images are copies of training images"
    noise = {"noise_multiplier": audit.noise_multiplier}
    facts = (subject.checkpoint, subject.digest)
    return [
        Verdict(site, "membership", *facts, not reason, reason, {"auc": auc, **noise}),
        Verdict(site, "memorisation", *facts, not copies, copies, {"copied": copied, **noise}),
    ]


def add_noise(members: NDArray[np.int64], held_out: NDArray[np.int64], num: int, sigma: float) -> NoisyCounts:
    """Counts of the cells of units, (number of units,) each, with secret Gaussian noise."""
    counts = np.concatenate([np.bincount(cells, minlength=num) for cells in (members, held_out)])
    found = noised(counts.astype(np.float64), sigma)
    return NoisyCounts(found[:num], found[num:])


def finds_control(subject: Subject, audit: AuditPolicy) -> bool:
    """Whether the score finds the images of a copy of the reference that has learned a few by heart; all are public."""
    side = subject.experiment.model.image_size
    drawn, _ = generate(CONTROL_IMAGES + CONTROL_OTHERS, side, seed=0, site="public", images_per_person=1)
    few = drawn[:CONTROL_IMAGES]
    model = retrained(
        subject.references[0], subject.experiment, ImageCache(lambda: few, len(few), side), audit.control_steps,
        lr=5e-4, grad_clip=1.0, ema_decay=0.0,
    )  # fmt: skip
    own = Subject(subject.checkpoint, subject.digest, model, subject.experiment, subject.references)
    images = torch.from_numpy(drawn)
    scores = np.concatenate([scores_of(own, images[start : start + BATCH]) for start in range(0, len(images), BATCH)])
    found = separation(scores[:CONTROL_IMAGES], scores[CONTROL_IMAGES:])
    return found.auc_interval[0] > audit.max_auc


def looker(
    subject: Subject, audit: AuditPolicy, samples: Sequence[Features], side: int
) -> Callable[[Tensor], NDArray[np.floating]]:
    """What the audit sees of images (N, 3, side, side), N at most `BATCH`: rows (N, 2) of score and whether copied.

    Weights that blow up the last bits of a number do not let one unit's images change the row of another one's.
    """
    is_mirrored = subject.experiment.data.horizontal_flip

    def look(images: Tensor) -> NDArray[np.floating]:
        is_copied = _copied(images, samples, audit.copy_ratio, is_mirrored=is_mirrored)
        return np.stack([scores_of(subject, images), is_copied.astype(np.float64)], 1)

    return one_by_one(look, BATCH, side, (subject.model, *subject.references))


def cells_of(
    look: Callable[[Tensor], NDArray[np.floating]], data: Dataset, units: Sequence[Rows], audit: AuditPolicy
) -> NDArray[np.int64]:
    """The cell of each unit, at least one of them: (number of units,) in [0, J)."""
    rows = np.concatenate(units)
    found = [look(data.images.batch(rows[start : start + BATCH])) for start in range(0, len(rows), BATCH)]
    scores, are_copied = np.concatenate(found).T
    starts = np.cumsum([0, *(len(unit) for unit in units)])[:-1]
    largest, is_copied = np.maximum.reduceat(scores, starts), np.logical_or.reduceat(are_copied > 0, starts)
    return np.where(is_copied, num_cells(audit) - 1, np.searchsorted(audit.score_edges, largest, "right"))


def scores_of(subject: Subject, images: Tensor) -> Scores:
    """Scores of at most `BATCH` images, (N,); whatever is not a number counts as the lowest score."""
    with np.errstate(all="ignore"):
        ours = _log_losses(subject.model, subject, _padded(images))
        theirs = np.mean([_log_losses(each, subject, _padded(images)) for each in subject.references], axis=0)
        scores = theirs - ours
    found: Scores = np.where(np.isnan(scores), -np.inf, scores)[: len(images)]
    return found


def _padded(images: Tensor) -> Tensor:
    """A full batch: what one image gives must not depend on how many others there are."""
    return torch.cat([images, images[:1].expand(BATCH - len(images), -1, -1, -1)])


def _log_losses(model: nn.Module, subject: Subject, images: Tensor) -> Scores:
    found = [loss_scores(model, subject.experiment, images, time=time, batch=BATCH) for time in TIMES]
    mean: Scores = np.log(-np.mean(found, axis=0))
    return mean


def _samples(model: nn.Module, subject: Subject, audit: AuditPolicy) -> Features:
    device = next(model.parameters()).device
    return pixel_features(sample_images(model, subject.experiment, range(audit.num_images), BATCH, device))


def _copied(images: Tensor, samples: Sequence[Features], ratio: float, *, is_mirrored: bool) -> NDArray[np.bool_]:
    """Whether some sample of the model is much nearer to an image than every sample of the reference, (N,)."""
    views = [images, images.flip(-1)] if is_mirrored else [images]
    ours, theirs = (
        np.min([nearest_neighbours(pixel_features(view), target)[0] for view in views], axis=0) for target in samples
    )
    near: NDArray[np.bool_] = ours < ratio * theirs
    return near


def _total(counts: Counts) -> float:
    """Units on one side, after noise: at least one, so that shares exist."""
    return max(1.0, float(counts.sum()))
