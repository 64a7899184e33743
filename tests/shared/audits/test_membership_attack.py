import numpy as np
import pytest
import torch
from torch import nn

from shared.audits.membership_attack import area, attack, calibrate, loss_scores, pia_scores, separation, tpr_at
from shared.data.synthetic import generate
from shared.diffusion.patches import patchify
from shared.diffusion.schedule import make_schedule, solve_x_0
from shared.experiment.config import parse_experiment

EXPERIMENT = parse_experiment("[model]\nimage_size = 8\npatch_size = 4\n")


class Empirical(nn.Module):
    """The exact noise predictor for data that is a set of images, blurred by `width`: at width 0 it knows only them."""

    def __init__(self, images, width):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))
        x = images.float() * (2 / 255) - 1
        self.x_NP = patchify(x, 4).flatten(1)
        self.width, self.schedule = width, make_schedule("cosine", 1000)

    def forward(self, tokens_BVP, t_B, _):
        alpha_bar = self.schedule.alpha_bar[t_B[0]].float()
        signal, variance = alpha_bar.sqrt(), alpha_bar * self.width**2 + 1 - alpha_bar
        x_t = tokens_BVP.flatten(1)
        logits = -torch.cdist(x_t, signal * self.x_NP).square() / (2 * variance)
        mean = logits.softmax(1) @ self.x_NP
        gain = signal * self.width**2 / variance
        x_0 = mean + gain * (x_t - signal * mean)
        return ((x_t - signal * x_0) / (1 - alpha_bar).sqrt()).view_as(tokens_BVP)


@pytest.fixture(scope="module")
def faces():
    images = torch.from_numpy(generate(240, 8, 0, site="site0", images_per_person=1)[0])
    return images[:80], images[80:160], images[160:]


def test_attack_finds_the_members_of_a_memoriser_and_calibration_helps(faces):
    members, others, public = faces
    found = attack(Empirical(members, 0.02), [Empirical(public, 0.3)], EXPERIMENT, members, others)
    assert found["calibrated"].auc > 0.95 and found["calibrated"].tpr > 0.5
    assert found["loss"].auc > 0.9 and found["pia"].auc > 0.7
    low, high = found["calibrated"].auc_interval
    assert low <= found["calibrated"].auc <= high


def test_attack_is_at_chance_on_a_model_that_never_saw_the_members(faces):
    members, others, public = faces
    found = attack(Empirical(public, 0.1), [Empirical(public, 0.3)], EXPERIMENT, members, others)
    assert 0.35 < found["calibrated"].auc < 0.65


def test_better_reference_is_kept(faces):
    members, others, public = faces
    model, useless = Empirical(members, 0.02), Empirical(members, 0.02)
    found = attack(model, [useless, Empirical(public, 0.3)], EXPERIMENT, members, others)
    assert found["calibrated"].auc > 0.95
    assert attack(model, [useless], EXPERIMENT, members, others)["calibrated"].auc == 0.5


def test_calibration_removes_what_the_reference_explains_and_no_more():
    rng = np.random.default_rng(0)
    difficulty, noise = rng.normal(0, 1, 400), rng.normal(0, 0.1, 400)
    losses = np.exp(0.7 * difficulty + noise)
    losses[:100] *= np.exp(-0.5)
    found = calibrate(-losses, -np.exp(difficulty), slice(100, None))
    assert separation(found[:100], found[100:]).auc > 0.99
    useless = calibrate(-losses, -np.exp(rng.normal(0, 1, 400)), slice(100, None))
    assert separation(useless[:100], useless[100:]).auc == pytest.approx(area(-losses[:100], -losses[100:]), abs=0.02)


def test_every_image_meets_the_same_noise(faces):
    members = faces[0]
    model = Empirical(faces[2], 0.1)
    scores = loss_scores(model, EXPERIMENT, members, time=0.1, batch=7)
    np.testing.assert_allclose(loss_scores(model, EXPERIMENT, members.flip(0), time=0.1)[::-1], scores, rtol=1e-4)


def test_pia_score_is_that_of_its_equation(faces):
    images, model = faces[0][:3], Empirical(faces[2], 0.1)
    schedule, t = make_schedule("cosine", 1000), round(0.05 * 999)
    ids = torch.arange(4).expand(3, -1)
    x_0 = patchify(images.float() * (2 / 255) - 1, 4)
    eps = model(x_0, torch.zeros(3, dtype=torch.long), ids)
    x_t = schedule.signal[t].float() * x_0 + schedule.noise[t].float() * eps
    expected = -(eps - model(x_t, torch.full((3,), t), ids)).abs().pow(4).sum((1, 2))
    np.testing.assert_allclose(
        pia_scores(model, EXPERIMENT, images, time=0.05), expected.detach().double().numpy(), rtol=1e-3
    )


@pytest.mark.parametrize("prediction", ["v", "x_0"])
def test_pia_sees_the_same_noise_whatever_the_network_predicts(faces, prediction):
    model, schedule = Empirical(faces[2], 0.1), make_schedule("cosine", 1000)

    class Converted(nn.Module):
        def __init__(self):
            super().__init__()
            self.anchor = nn.Parameter(torch.zeros(()))

        def forward(self, tokens, t_B, ids):
            eps = model(tokens, t_B, ids)
            signal, noise = schedule.signal[t_B[0]].float(), schedule.noise[t_B[0]].float()
            x_0 = solve_x_0("eps", eps, tokens, signal, noise)
            return x_0 if prediction == "x_0" else signal * eps - noise * x_0

    experiment = parse_experiment(EXPERIMENT.to_toml(), [f"diffusion.prediction={prediction}"])
    found = pia_scores(Converted(), experiment, faces[0], time=0.1)
    np.testing.assert_allclose(found, pia_scores(model, EXPERIMENT, faces[0], time=0.1), rtol=2e-2)


def test_area_equals_scikit_learn_with_ties():
    rng = np.random.default_rng(0)
    members, others = rng.integers(0, 9, 50).astype(float), rng.integers(0, 7, 70).astype(float)
    labels = np.concatenate([np.ones(50), np.zeros(70)])
    from sklearn.metrics import roc_auc_score  # loads for seconds

    assert area(members, others) == pytest.approx(roc_auc_score(labels, np.concatenate([members, others])))


def test_tpr_allows_one_percent_of_the_others():
    others = np.arange(200.0)
    assert tpr_at(np.array([196.0, 197.5, 198.5, 500.0]), others) == 0.75
    assert tpr_at(np.array([5.0]), np.array([4.0])) == 1.0


def test_interval_narrows_with_more_images():
    rng = np.random.default_rng(0)
    few = separation(rng.normal(1, 1, 40), rng.normal(0, 1, 40))
    many = separation(rng.normal(1, 1, 2000), rng.normal(0, 1, 2000))
    width = [result.auc_interval[1] - result.auc_interval[0] for result in (few, many)]
    assert width[1] < width[0] / 3 and many.auc == pytest.approx(0.76, abs=0.03)


@pytest.mark.parametrize("scores", [loss_scores, pia_scores])
def test_attacks_know_networks_of_two_sequences(scores):
    from shared.diffusion.uvit import build_model

    experiment = parse_experiment('[data]\nwavelet = "haar"\nwavelet_tokens = "split"')
    torch.manual_seed(0)
    found = scores(build_model(experiment), experiment, torch.from_numpy(generate(3, 32, 0)[0]), time=0.1)
    assert found.shape == (3,)
    assert np.isfinite(found).all()
