"""Audits at a site: a memoriser fails, a model of the distribution passes, and only the verdict leaves."""

import json
import stat

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from client.answers import attacks as module
from client.answers.attacks import AuditOptions, audit
from client.answers.audited_model import Subject, subject_of, with_tuned_reference
from client.answers.verdicts import Verdict, charge_operator, write_verdicts
from client.data.dataset import open_dataset
from client.privacy.epsilon import epsilon_of
from client.records.journal import Journal
from client.records.ledger import read_ledger
from shared.audits.membership_attack import AttackResult, loss_scores
from shared.data.synthetic import generate, write_folder
from shared.diffusion.patches import patchify
from shared.diffusion.schedule import make_schedule
from shared.errors import InputError
from shared.experiment.config import parse_experiment
from shared.seeding import Streams
from shared.storage.checkpoint import load_meta, save_checkpoint
from shared.storage.synthetic_mark import read_mark
from shared.training.weights import new_model

TOML = "[model]\nimage_size = 16\npatch_size = 4\n[evaluation]\nsampler = 'dpm++'\nsteps = 12\n"
GOOD_CONTROL = AttackResult(0.99, (0.98, 1.0), 0.9, (0.8, 1.0))


class Empirical(nn.Module):
    """The exact noise predictor for a set of images blurred by `width`; at width 0 it can only repeat them."""

    def __init__(self, images, width):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))
        self.x_NP = patchify(images.float() * (2 / 255) - 1, 4).flatten(1)
        self.width, self.schedule = width, make_schedule("cosine", 1000)

    def forward(self, tokens_BVP, t_B, _):
        alpha_bar = self.schedule.alpha_bar[t_B[0]].float()
        signal, variance = alpha_bar.sqrt(), alpha_bar * self.width**2 + 1 - alpha_bar
        x_t = tokens_BVP.flatten(1)
        mean = (-torch.cdist(x_t, signal * self.x_NP).square() / (2 * variance)).softmax(1) @ self.x_NP
        x_0 = mean + signal * self.width**2 / variance * (x_t - signal * mean)
        return ((x_t - signal * x_0) / (1 - alpha_bar).sqrt()).view_as(tokens_BVP)


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    """These models are told apart by a fourth of the noises."""
    monkeypatch.setattr("shared.audits.membership_attack.DRAWS", 4)


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """400 images of 200 persons."""
    folder = tmp_path_factory.mktemp("faces")
    write_folder(folder, 400, 16, 3, site="site0", images_per_person=2)
    return folder


@pytest.fixture
def site(faces, make_site):
    """A site that holds out about half of the images."""
    return make_site(faces, held_out_ratio=0.5, tasks=("train", "audit"))


@pytest.fixture(scope="module")
def other_images():
    """Of the same kind, and public ones."""
    return [
        torch.from_numpy(generate(400, 16, seed, site=site, images_per_person=count)[0])
        for seed, site, count in ((9, "site0", 1), (0, "public", 4))
    ]


@pytest.fixture
def models(site, other_images, monkeypatch):
    """The memoriser, a model of other images of the same kind, the public start."""
    data = open_dataset(site[0], 16)
    other, public = other_images
    monkeypatch.setattr(module, "control_attack", lambda *_: GOOD_CONTROL)
    return {
        "memoriser": Empirical(data.images.batch(data.train), 0.02),
        "good": Empirical(other, 0.25),
        "public": Empirical(public, 0.4),
    }


def subject(models, name):
    return Subject("round-000003", "ab" * 32, models[name], parse_experiment(TOML), (models["public"],))


OPTIONS = AuditOptions(num_images=60)


def outcome(verdicts):
    return {verdict.audit: verdict.passed for verdict in verdicts}


def test_a_memoriser_fails_both_audits_and_figures_and_pairs_stay_in_the_home(site, models):
    verdicts = audit(*site, subject(models, "memoriser"), OPTIONS)
    assert outcome(verdicts) == {"membership": False, "memorisation": False}
    figures = {verdict.audit: verdict.figures for verdict in verdicts}
    assert figures["membership"]["auc"] > 0.9 and figures["memorisation"]["copy_rate"] > 0.5
    files = sorted((site[0].path / "audits").iterdir())
    assert [path.suffix for path in files] == [".png", ".json"]
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in files)
    with Image.open(files[0]) as sheet:
        assert sheet.size == (8 * 18 - 2, 4 * 18 - 2)
    mark = read_mark(files[0])
    assert mark is not None and mark.source_type == "compositeWithTrainedAlgorithmicMedia"
    assert json.loads(files[1].read_text())[0]["figures"]["auc"] > 0.9


def test_a_model_that_never_saw_the_images_passes_both(site, models):
    verdicts = audit(*site, subject(models, "good"), OPTIONS)
    assert outcome(verdicts) == {"membership": True, "memorisation": True}


def test_a_null_result_counts_only_when_the_control_is_found(site, models, monkeypatch):
    monkeypatch.setattr(module, "control_attack", lambda *_: AttackResult(0.6, (0.5, 0.7), 0.0, (0.0, 0.0)))
    verdicts = audit(*site, subject(models, "good"), OPTIONS)
    assert outcome(verdicts) == {"membership": False, "memorisation": True}
    assert "inconclusive" in verdicts[0].reason


def test_too_small_a_held_out_split_is_refused(make_site, models):
    home, settings = make_site(None, held_out_ratio=0.5)
    with pytest.raises(InputError, match=r"held-out images and .* an audit needs"):
        audit(home, settings, subject(models, "good"), OPTIONS)


# ---- What leaves ----


@pytest.fixture
def verdicts():
    facts = {"site": "site0", "checkpoint": "round-000003", "checkpoint_digest": "ab" * 32}
    return [
        Verdict(audit="membership", passed=True, reason="", figures={"auc": 0.51}, **facts),
        Verdict(audit="memorisation", passed=False, reason="copies", figures={"copy_rate": 0.2}, **facts),
    ]


def test_what_is_written_was_charged_and_is_noted(make_site, verdicts, tmp_path):
    home, _ = make_site()
    write_verdicts(home, verdicts, tmp_path / "out")
    written = [json.loads(path.read_text()) for path in sorted((tmp_path / "out").iterdir())]
    assert [(each["audit"], each["passed"]) for each in written] == [("membership", True), ("memorisation", False)]
    last = Journal(home.journal).entries()[-1]
    assert last.kind == "release" and "membership auc" in last.fields["numbers"]


def test_counts_by_the_operators_hand_cost_one_step_of_noise(site):
    home, settings = site
    audit = settings.policy.audit.model_copy(update={"noise_multiplier": 1.5})
    settings = settings.model_copy(update={"policy": settings.policy.model_copy(update={"audit": audit})})
    charge_operator(home, settings, "ab" * 32, figures=False, epsilon_of=epsilon_of)
    ((_, charge),) = read_ledger(home.ledger).charges
    assert (charge.task, charge.mechanism, charge.noise_multiplier) == ("audit", "gaussian", 1.5)
    assert (charge.sample_rate, charge.steps) == (1.0, 1)


def test_too_few_units_are_told_before_anything_is_charged(make_site):
    home, settings = make_site(tasks=("audit",))
    with pytest.raises(InputError, match="an audit needs"):
        charge_operator(home, settings, "ab" * 32, figures=False, epsilon_of=epsilon_of)
    assert read_ledger(home.ledger).charges == []


def test_figures_are_charged_as_a_release_without_dp(make_site):
    home, settings = make_site(tasks=("audit",))
    charge_operator(home, settings, "ab" * 32, figures=True, epsilon_of=epsilon_of)
    ((_, charge),) = read_ledger(home.ledger).charges
    assert charge.task == "audit" and charge.mechanism == "none"
    dataset_id = open_dataset(home, 16).dataset_id
    assert read_ledger(home.ledger).total(dataset_id, 1e-5, epsilon_of).is_unbounded


@pytest.mark.parametrize(
    ("policy", "text"),
    [({"tasks": ("train",)}, "does not list `audit`"), ({"tasks": ("audit",), "require_dp": True}, "require_dp")],
)
def test_figures_need_the_policys_leave(make_site, policy, text):
    home, settings = make_site(**policy)
    with pytest.raises(InputError, match=text):
        charge_operator(home, settings, "ab" * 32, figures=True, epsilon_of=epsilon_of)
    assert read_ledger(home.ledger).charges == []


def test_control_learns_its_images_and_the_attack_runs_on_it():
    from shared.diffusion.uvit import UViT

    experiment = parse_experiment("[model]\nimage_size = 8\npatch_size = 4\n")
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (60, 3, 8, 8), dtype=np.uint8))
    torch.manual_seed(0)
    start = UViT(in_channels=3, grid_size=2, patch_size=4, width=32, num_blocks=3, num_heads=2).eval()
    before = [parameter.clone() for parameter in start.parameters()]
    own = Subject("x", "ab" * 32, start, experiment, (start,))
    found = module.control_attack(own, images[:8], images[8:], steps=150)
    assert found.auc > 0.75
    assert all(torch.equal(one, other) for one, other in zip(before, start.parameters(), strict=True))


# ---- Models from files ----


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Two checkpoints of one geometry and one of another."""
    folder = tmp_path_factory.mktemp("models")
    for name, patch in (("model", 8), ("public", 8), ("other", 16)):
        experiment = parse_experiment(f"[model]\nimage_size = 16\npatch_size = {patch}\n")
        tensors = new_model(experiment, Streams(0, (name,))).state_dict()
        arrays = {key: tensor.numpy() for key, tensor in tensors.items()}
        save_checkpoint(folder / name, {"ema": arrays}, {"experiment": experiment, "round": 3})
    return folder


def test_subject_of_checkpoints_is_named_and_overridden(checkpoints):
    found = subject_of(checkpoints / "model", [checkpoints / "public"], device="cpu", overrides=["evaluation.steps=7"])
    assert found.checkpoint == "model" and found.digest == load_meta(checkpoints / "model").digest
    assert found.experiment.evaluation.steps == 7 and len(found.references) == 1


def test_useless_references_are_refused(checkpoints):
    with pytest.raises(InputError, match="--reference"):
        subject_of(checkpoints / "model", [], device="cpu")
    with pytest.raises(InputError, match="another network or schedule"):
        subject_of(checkpoints / "model", [checkpoints / "other"], device="cpu")
    with pytest.raises(InputError, match="is the audited model itself"):
        subject_of(checkpoints / "model", [checkpoints / "model"], device="cpu")


def test_public_fine_tuning_gives_one_more_reference_that_denoises_better(checkpoints):
    before = subject_of(checkpoints / "model", [checkpoints / "public"], device="cpu")
    found = with_tuned_reference(before, "synthetic:public:64", 15)
    assert len(found.references) == 2 and found.references[0] is before.references[0]
    fresh = torch.from_numpy(generate(32, 16, 5, site="public")[0])
    scores = [loss_scores(model, found.experiment, fresh, time=0.1).mean() for model in found.references]
    assert scores[1] > scores[0]
