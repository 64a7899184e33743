"""Counts of an audit: one unit moves one of them by one, whatever the weights are, and the verdict follows."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from client.answers import audit_counts as module
from client.answers.audit_counts import NoisyCounts, add_noise, cells_of, counted_verdicts, looker
from client.answers.audit_power import num_cells, units_of
from client.answers.audited_model import Subject
from client.data.dataset import open_dataset
from client.limits import AuditPolicy
from shared.data.synthetic import generate, write_folder
from shared.experiment.config import parse_experiment
from tests.client.answers.test_attacks import Empirical

TOML = "[model]\nimage_size = 16\npatch_size = 4\n[evaluation]\nsampler = 'dpm++'\nsteps = 12\n"
AUDIT = AuditPolicy(noise_multiplier=1.0, num_images=60)


class Broken(nn.Module):
    """A network of hostile weights: its output is infinite for some images and not a number for others."""

    def __init__(self):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))

    def forward(self, tokens_BVP, *_):
        bright = tokens_BVP.mean(dim=(1, 2), keepdim=True) > 0
        return torch.where(bright, torch.inf, torch.nan) * torch.ones_like(tokens_BVP)


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    """These models are told apart by a fourth of the noises."""
    monkeypatch.setattr("shared.audits.membership_attack.DRAWS", 4)


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faces")
    write_folder(folder, 300, 16, 3, site="site0", images_per_person=2)
    return folder


@pytest.fixture
def site(faces, make_site):
    return make_site(faces, held_out_ratio=0.5)


@pytest.fixture(scope="module")
def public():
    return Empirical(torch.from_numpy(generate(400, 16, 0, site="public")[0]), 0.4)


@pytest.fixture
def subject(site, public):
    data = open_dataset(site[0], 16)
    model = Empirical(data.images.batch(data.train), 0.02)
    return Subject("round-1", "ab" * 32, model, parse_experiment(TOML), (public,))


def look_with(subject, sampled=None):
    sampled = sampled or subject
    samples = [module._samples(model, sampled, AUDIT) for model in (sampled.model, sampled.references[0])]
    return looker(subject, AUDIT, samples, 16)


@pytest.mark.parametrize("unit", ["image", "person"])
def test_one_unit_less_takes_one_from_one_count(site, subject, unit):
    data, look = open_dataset(site[0], 16), look_with(subject)
    units = units_of(data, data.train, unit)
    cells = cells_of(look, data, units, AUDIT)
    assert cells.shape == (len(units),) and cells.min() >= 0 and cells.max() < num_cells(AUDIT)
    for gone in (7, len(units) - 1):
        without = cells_of(look, data, units[:gone] + units[gone + 1 :], AUDIT)
        np.testing.assert_array_equal(without, np.delete(cells, gone))


def test_weights_that_overflow_are_a_cell_like_any_other(site, subject):
    data = open_dataset(site[0], 16)
    broken = Subject("round-1", "ab" * 32, Broken(), subject.experiment, subject.references)
    cells = cells_of(look_with(broken, subject), data, units_of(data, data.train, "image"), AUDIT)
    assert set(cells) <= {0, num_cells(AUDIT) - 1}


def test_a_memoriser_fails_both_verdicts_and_a_stranger_passes(site, subject, monkeypatch):
    monkeypatch.setattr(module, "finds_control", lambda *_: True)
    data = open_dataset(site[0], 16)
    bad = counted_verdicts("site0", subject, data, "image", AUDIT)
    assert [(each.audit, each.passed) for each in bad] == [("membership", False), ("memorisation", False)]
    stranger = Subject("round-1", "ab" * 32, subject.references[0], subject.experiment, subject.references)
    good = counted_verdicts("site0", stranger, data, "image", AUDIT)
    assert [each.passed for each in good] == [True, True] and good[0].figures["noise_multiplier"] == 1.0


def test_a_pass_needs_a_control_that_is_found(site, subject, monkeypatch):
    monkeypatch.setattr(module, "finds_control", lambda *_: False)
    stranger = Subject("round-1", "ab" * 32, subject.references[0], subject.experiment, subject.references)
    found = counted_verdicts("site0", stranger, open_dataset(site[0], 16), "image", AUDIT)
    assert [each.passed for each in found] == [False, True] and "inconclusive" in found[0].reason


def test_each_side_has_its_counts_and_noise_of_its_own():
    counts = add_noise(np.array([0, 0, 2]), np.array([1]), 4, 1e-3)
    np.testing.assert_allclose(counts.members, [2, 0, 1, 0], atol=0.01)
    np.testing.assert_allclose(counts.held_out, [0, 1, 0, 0], atol=0.01)
    again = add_noise(np.array([0, 0, 2]), np.array([1]), 4, 1e-3)
    assert (counts.members != again.members).all() and (counts.held_out[1:] != counts.members[1:]).all()


def test_figures_of_exact_counts_are_those_of_the_units():
    rng = np.random.default_rng(0)
    ours, theirs = rng.integers(0, 5, 60), rng.integers(0, 4, 50)
    counts = NoisyCounts(np.bincount(ours, minlength=6).astype(float), np.bincount(theirs, minlength=6).astype(float))
    pairs = np.sign(ours[:, None] - theirs[None])
    assert counts.auc == pytest.approx((pairs.mean() + 1) / 2)
    counts.members[-1], counts.held_out[-1] = 20.0, 10.0
    assert counts.copied == pytest.approx(20 / 80 - 10 / 60)


def test_the_control_learns_public_images_and_is_found(monkeypatch):
    """What training comes to is stood in for: the control of `test_attacks.py` is trained."""
    start = Empirical(torch.from_numpy(generate(60, 8, 5, site="public")[0]), 0.4)
    own = Subject("x", "ab" * 32, start, parse_experiment("[model]\nimage_size = 8\npatch_size = 4\n"), (start,))
    learned = lambda _start, _experiment, images, *_, **__: Empirical(images.batch(np.arange(len(images))), 0.02)  # noqa: E731
    monkeypatch.setattr(module, "retrained", learned)
    assert module.finds_control(own, AuditPolicy())
    # A control that has learned nothing scores like its reference.
    monkeypatch.setattr(module, "retrained", lambda start, *_, **__: start)
    assert not module.finds_control(own, AuditPolicy())


def verdicts_of(monkeypatch, members, held_out, audit):
    """Both verdicts where the noisy counts are these."""
    counts = NoisyCounts(np.array(members, float), np.array(held_out, float))
    monkeypatch.setattr(module, "finds_control", lambda *_: True)
    monkeypatch.setattr(module, "_samples", lambda *_: np.zeros(1))
    monkeypatch.setattr(module, "looker", lambda *_: None)
    monkeypatch.setattr(module, "cells_of", lambda *_: np.zeros(1, np.int64))
    monkeypatch.setattr(module, "add_noise", lambda *_: counts)
    rows = np.zeros(0, np.int64)
    data = SimpleNamespace(units=lambda _: [rows], held_out=rows, persons=None, size=16)
    return counted_verdicts("site0", SUBJECT, data, "image", audit)


SUBJECT = SimpleNamespace(checkpoint="round-1", digest="ab" * 32, model=None, references=(None,))


@pytest.mark.parametrize(
    ("members", "held_out", "auc", "copied", "passed"),
    [
        ([4, 6, 0], [6, 4, 0], 0.6, 0.0, [True, True]),  # both at their limits
        ([4, 6.1, 0], [6, 4, 0], 0.602, 0.0, [False, True]),
        ([95, 0, 5], [100, 0, 0], 0.525, 0.05, [True, True]),
        ([94, 0, 6], [100, 0, 0], 0.53, 0.06, [True, False]),
        ([94, 0, 6], [99, 0, 1], 0.525, 0.05, [True, True]),  # copies among held-out images do not count
        ([0, 0, 10], [10, 0, 0], 1.0, 1.0, [False, False]),
        ([10, 0, 0], [0, 0, 10], 0.0, 0.0, [True, True]),
        ([0.1, 0.1, 0], [0.1, 0, 0.2], 0.015, 0.0, [True, True]),  # noise alone counts as one unit
    ],
)
def test_verdicts_follow_from_the_noisy_counts_and_the_sites_limits(
    monkeypatch, members, held_out, auc, copied, passed
):
    audit = AuditPolicy(noise_multiplier=3.0, max_auc=0.6, max_copied=0.05)
    found = verdicts_of(monkeypatch, members, held_out, audit)
    assert [each.figures for each in found] == [
        {"auc": auc, "noise_multiplier": 3.0},
        {"copied": copied, "noise_multiplier": 3.0},
    ]
    assert [each.passed for each in found] == passed
    assert [bool(each.reason) for each in found] == [not each for each in passed]
    assert [(each.audit, each.site, each.checkpoint) for each in found] == [
        ("membership", "site0", "round-1"),
        ("memorisation", "site0", "round-1"),
    ]


def test_a_unit_falls_into_the_cell_of_its_largest_score_or_into_that_of_copies(monkeypatch):
    """Rows 0 to 5: three units; a score that is a threshold belongs above it."""
    scores, copies = {0: 0.3, 1: -0.7, 2: 0.5, 3: 0.1, 4: 9.0, 5: 0.2}, {5}
    images = lambda rows: torch.as_tensor(np.asarray(rows)).view(-1, 1, 1, 1)  # noqa: E731
    look = lambda part: np.array([(scores[each], each in copies) for each in part.flatten().tolist()])  # noqa: E731
    audit = AuditPolicy(score_edges=(-0.5, 0.0, 0.5, 1.0))
    data = SimpleNamespace(images=SimpleNamespace(batch=images))
    units = [np.array([1]), np.array([0, 2]), np.array([3]), np.array([4]), np.array([5, 3])]
    for batch in (2, 64):
        monkeypatch.setattr(module, "BATCH", batch)
        assert cells_of(look, data, units, audit).tolist() == [0, 3, 2, 4, 5]


def test_the_score_is_how_much_likelier_the_model_makes_an_image_than_the_references_do(monkeypatch):
    losses = {"model": [0.5, 0.2, np.nan], "one": [1.0, 0.4, 1.0], "two": [3.0, 0.2, 1.0]}
    monkeypatch.setattr(module, "_log_losses", lambda name, *_: np.log(losses[name] + [1.0] * (module.BATCH - 3)))
    subject = SimpleNamespace(model="model", references=("one", "two"))
    found = module.scores_of(subject, torch.zeros(3, 3, 2, 2))
    assert found[:2] == pytest.approx([np.log(3) / 2 - np.log(0.5), np.log(0.4 * 0.2) / 2 - np.log(0.2)])
    assert found.shape == (3,) and found[2] == -np.inf


@pytest.mark.parametrize(("low", "is_found"), [(0.6, False), (0.61, True)])
def test_the_control_must_be_found_beyond_the_limit(monkeypatch, low, is_found):
    monkeypatch.setattr(module, "retrained", lambda *_, **__: "control")
    monkeypatch.setattr(module, "scores_of", lambda subject, part: np.full(len(part), subject.model == "control"))
    seen = []
    interval = lambda ours, theirs: seen.append((len(ours), len(theirs))) or SimpleNamespace(auc_interval=(low, 1.0))  # noqa: E731
    monkeypatch.setattr(module, "separation", interval)
    subject = Subject(
        "x", "ab" * 32, "model", parse_experiment("[model]\nimage_size = 8\npatch_size = 4\n"), ("start",)
    )
    assert module.finds_control(subject, AuditPolicy(max_auc=0.6)) is is_found
    assert seen == [(32, 128)]
