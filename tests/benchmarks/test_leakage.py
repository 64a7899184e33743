"""Leakage by masking: who is in which set, equal operations, what an update can give away, and what the table says."""

import json
from functools import partial

import numpy as np
import pytest
import torch

from benchmarks.leakage import __main__ as leakage
from benchmarks.leakage import inversion, training
from benchmarks.leakage.inversion import gradient, invert
from benchmarks.leakage.table import difference, table
from benchmarks.leakage.training import divide, experiment, steps_for
from shared.data.image_set import ImageCache, synthetic_images
from shared.diffusion import uvit
from shared.diffusion.losses import draw_noise, to_model_range
from shared.diffusion.patches import patchify
from shared.diffusion.schedule import make_schedule
from shared.diffusion.uvit import build_model
from shared.seeding import Streams
from shared.training.flops import train_flops


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(uvit.SIZES, "T", partial(uvit.UViT, width=24, num_blocks=3, num_heads=2))
    monkeypatch.setattr(training, "MEMBERS", 6)
    monkeypatch.setattr(training, "OTHERS", 50)
    monkeypatch.setattr(training, "BATCH", 4)


def faces(count=140):
    pixels = synthetic_images(f"synthetic:site0:{count}:0", training.SIZE).images
    return ImageCache(lambda: pixels, count, training.SIZE, persons=np.arange(count) // 2)


@pytest.mark.usefixtures("small")
def test_nobody_is_in_two_sets_and_seeds_choose_others():
    images = faces()
    first, other = divide(images, 0), divide(images, 1)
    parts = [first.members, first.shadow, first.tuning, first.others]
    assert [len(part) for part in parts] == [6, 6, 6, 50]
    assert len(set(first.persons.tolist())) == 50
    everything = torch.cat(parts).flatten(1)
    assert len(torch.unique(everything, dim=0)) == len(everything)
    assert not torch.equal(first.members, other.members)
    with pytest.raises(SystemExit, match="at least 68 are needed"):
        divide(faces(120), 0)


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.9])
def test_every_ratio_has_the_same_operations(ratio):
    plan = experiment(ratio, 0)
    spent = steps_for(plan, 8e12) * plan.train.batch * train_flops(plan)
    assert spent == pytest.approx(8e12, rel=0.01)


@pytest.mark.usefixtures("small")
def test_what_a_mask_hides_is_in_no_gradient():
    plan = experiment(0.9, 0)
    model, schedule = build_model(plan), make_schedule("cosine", 1000)
    draw = draw_noise(plan, 1, Streams(0).generator("noise"))
    image = torch.rand(1, 3, training.SIZE, training.SIZE) * 2 - 1
    changed = image.clone()
    patches = patchify(torch.arange(training.SIZE**2.0).view(1, 1, training.SIZE, training.SIZE), 4)[0].long()
    hidden = np.setdiff1d(np.arange(len(patches)), draw.ids_BL[0].numpy())
    changed.view(1, 3, -1)[:, :, patches[hidden].flatten()] = 0.0
    own, other = (gradient(model, schedule, plan, each, draw) for each in (image, changed))
    assert all(torch.equal(one, two) for one, two in zip(own, other, strict=True))
    assert any(bool(each.any()) for each in own)


@pytest.mark.usefixtures("small")
def test_an_image_is_recovered_from_its_gradient_better_than_guessed(monkeypatch):
    monkeypatch.setattr(inversion, "ITERATIONS", 40)
    torch.manual_seed(0)
    images, plan = divide(faces(), 0), experiment(0.9, 0)
    found = invert(build_model(plan), plan, images.tuning[:1], images.others, 0)
    mean = to_model_range(images.others).mean(0)
    assert found.guess == pytest.approx(float((mean - to_model_range(images.tuning[0])).square().mean()), rel=1e-5)
    # Hidden patches stay about what was guessed.
    assert found.visible < 0.5 * found.guess and found.all > 0.5 * found.guess


def row(arm, seed, before, after):
    score = {"auc_loss": 0.5, "auc_pia": 0.5, "tpr": 0.0, "copied": 0.0, "unseen_loss": 0.1}
    scores = {
        "pre-trained": score | {"auc_calibrated": before},
        "fine-tuned": score | {"auc_calibrated": after},
    }
    return {"arm": arm, "seed": seed, "scores": scores, "inversion": {"visible": 0.1, "all": 0.2, "guess": 0.3}}


def test_the_difference_that_masking_makes_is_paired_by_seed(capsys):
    rows = [row("whole", seed, 0.9 + 0.01 * seed, 0.6) for seed in range(3)]
    rows += [row("most", seed, 0.7, 0.6) for seed in (0, 1, 2)] + [row("half", 0, 0.8, 0.7)]
    # Differences -0.20, -0.21 and -0.22: deviation 0.01, Student's 4.303 over the root of three.
    half = 4.303 * 0.01 / 3**0.5
    text, is_lower = difference(rows, "pre-trained")
    assert text.endswith(f"-0.210 [{-0.21 - half:+.3f}, {-0.21 + half:+.3f}] over 3 seeds") and is_lower
    assert difference(rows, "fine-tuned")[1] is False
    assert table(rows)[1] is False
    assert "0.7000" in capsys.readouterr().out
    assert difference(rows[:1], "pre-trained") == ("0 seeds with ratios 0 and 0.9, at least two are needed", False)


def test_arms_that_are_there_are_not_run_again(tmp_path, monkeypatch, capsys):
    results, ran = tmp_path / "results.jsonl", []
    results.write_text(json.dumps(row("whole", 0, 0.9, 0.6)) + "\n")

    def run(name, seed, _images):
        ran.append((name, seed))
        return row(name, seed, 0.5 + 0.1 * seed, 0.5)

    monkeypatch.setattr(leakage, "run", run)
    monkeypatch.setattr(leakage, "divide", lambda _images, seed: seed)
    monkeypatch.setattr(leakage, "open_images", lambda *_: None)
    monkeypatch.setattr(leakage, "images_per_second", lambda *_: 10.0)
    monkeypatch.setattr(torch, "set_num_threads", lambda _count: None)
    options = ["--faces", "faces", "--seeds", "2", "--results", str(results), "--arms", "whole,most"]
    assert leakage.main(options) == 1
    assert ran == [("most", 0), ("whole", 1), ("most", 1)]
    assert "3 arms: about" in capsys.readouterr().out
    leakage.main(options)
    assert len(ran) == 3 and len(results.read_text().splitlines()) == 4


def test_without_faces_and_results_nothing_is_measured(tmp_path):
    assert leakage.main(["--results", str(tmp_path / "none.jsonl")]) == 77
