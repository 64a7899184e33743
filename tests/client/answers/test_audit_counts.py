"""Counts of an audit: one unit moves one of them by one, whatever the weights are, and the verdict follows."""

import numpy as np
import pytest
import torch
from torch import nn

from client.answers import audit_counts as module
from client.answers.audit_counts import NoisyCounts, add_noise, cells_of, counted_verdicts
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


@pytest.fixture
def site(tmp_path, make_site):
    write_folder(tmp_path / "faces", 300, 16, 3, site="site0", images_per_person=2)
    return make_site(tmp_path / "faces", held_out_ratio=0.5)


@pytest.fixture
def subject(site):
    data = open_dataset(site[0], 16)
    public = Empirical(torch.from_numpy(generate(400, 16, 0, site="public")[0]), 0.4)
    model = Empirical(data.images.batch(data.train), 0.02)
    return Subject("round-1", "ab" * 32, model, parse_experiment(TOML), (public,))


def samples(subject):
    return [module._samples(model, subject, AUDIT) for model in (subject.model, subject.references[0])]


@pytest.mark.parametrize("unit", ["image", "person"])
def test_one_unit_less_takes_one_from_one_count(site, subject, unit):
    data, drawn = open_dataset(site[0], 16), samples(subject)
    units = units_of(data, data.train, unit)
    cells = cells_of(subject, data, units, AUDIT, drawn)
    assert cells.shape == (len(units),) and cells.min() >= 0 and cells.max() < num_cells(AUDIT)
    for gone in (7, len(units) - 1):
        without = cells_of(subject, data, units[:gone] + units[gone + 1 :], AUDIT, drawn)
        np.testing.assert_array_equal(without, np.delete(cells, gone))


def test_weights_that_overflow_are_a_cell_like_any_other(site, subject):
    data = open_dataset(site[0], 16)
    broken = Subject("round-1", "ab" * 32, Broken(), subject.experiment, subject.references)
    cells = cells_of(broken, data, units_of(data, data.train, "image"), AUDIT, samples(subject))
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
    from shared.diffusion.uvit import UViT

    experiment = parse_experiment("[model]\nimage_size = 8\npatch_size = 4\n")
    torch.manual_seed(0)
    start = UViT(in_channels=3, grid_size=2, patch_size=4, width=32, num_blocks=3, num_heads=2).eval()
    own = Subject("x", "ab" * 32, start, experiment, (start,))
    monkeypatch.setattr(module, "CONTROL_IMAGES", 8)
    assert module.finds_control(own, AuditPolicy(control_steps=600))
    # A control that has learned nothing scores like its reference.
    monkeypatch.setattr(module, "retrained", lambda start, *_, **__: start)
    assert not module.finds_control(own, AuditPolicy())
