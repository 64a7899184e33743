"""Distances with the share of copies beside them: a model that hands out its training images is found out."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from server.evaluation.reference import open_reference
from server.studies.run import arm_distances
from server.studies.run.arm_distances import Measure
from server.studies.stored_results import HELD_OUT_LOSS
from shared.data.image_cache import build_cache
from shared.data.synthetic import write_folder
from shared.evaluation.feature_statistics import accumulate, statistics_of
from shared.evaluation.frechet import frechet_distance, jackknife_distances, jackknife_groups, jackknife_interval
from shared.evaluation.networks import load_extractor
from shared.experiment.config import parse_experiment

EXPERIMENT = parse_experiment('[model]\nimage_size = 16\n[evaluation]\nsampler = "dpm++"\nsteps = 2\nbatch = 30\n')
NUM_IMAGES = 60


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Image caches of three sets of synthetic persons."""
    folder = tmp_path_factory.mktemp("distances")
    for number, (name, count) in enumerate((("train", 40), ("test", 80), ("validation", 160), ("few", 16))):
        write_folder(folder / name, count, 16, number, site=f"site{number}")
        build_cache(folder / name, folder / f"{name}.cache", 16)
    return folder


@pytest.fixture(scope="module")
def extractor():
    return load_extractor("random-inception")


@pytest.fixture(autouse=True)
def few_groups(monkeypatch):
    """How good intervals are is shown by `test_scores.py` and `test_frechet.py`."""
    monkeypatch.setattr("shared.evaluation.frechet.JACKKNIFE_GROUPS", 4)


def measure(place, extractor, validation="validation"):
    return Measure(
        extractors=[extractor],
        references={"test": place / "test.cache", "validation": place / f"{validation}.cache"},
        training=place / "train.cache",
        size=16,
        kept=place / "references",
        num_images=NUM_IMAGES,
        device=torch.device("cpu"),
        on_progress=lambda _done, _total: None,
    )


def images_of(place, name, count=NUM_IMAGES):
    cache = build_cache(place / name, place / f"{name}.cache", 16)
    return cache.batch(np.linspace(0, len(cache) - 1, count).round().astype(np.int64))


def a_model_that_draws(images_NCHW, monkeypatch):
    loaded = SimpleNamespace(
        model=None, experiment=EXPERIMENT, nfe=2, weights="ema", meta=SimpleNamespace(digest="0" * 64)
    )
    monkeypatch.setattr(arm_distances, "load_model", lambda *_args, **_options: loaded)
    monkeypatch.setattr(arm_distances, "sample_images", lambda *_args, **_options: images_NCHW)
    monkeypatch.setattr(arm_distances, "held_out_loss", lambda *_args, **_options: SimpleNamespace(mean=0.5, error=0.1))


def test_a_model_that_hands_out_its_training_images_gets_their_distance_and_is_called_a_copier(
    place, extractor, monkeypatch
):
    name, asked = extractor.space.distance_name, measure(place, extractor)
    a_model_that_draws(images_of(place, "train"), monkeypatch)
    found = asked(place / "checkpoint")
    assert found.copied == {"pixels": 1.0, name: 1.0}
    assert asked.of_training_images()["test"][name]["distance"] == pytest.approx(
        found.metrics["test"][name]["distance"], rel=1e-6
    )


def test_images_of_other_persons_are_no_copies(place, extractor, monkeypatch):
    a_model_that_draws(images_of(place, "test"), monkeypatch)
    found = measure(place, extractor)(place / "checkpoint")
    assert set(found.copied) == {"pixels", extractor.space.distance_name}
    # A threshold that one of twenty honest images passes, and 60 images.
    assert max(found.copied.values()) <= 0.1


def test_copies_in_the_mirror_are_copies(place, extractor, monkeypatch):
    a_model_that_draws(images_of(place, "train").flip(-1), monkeypatch)
    assert measure(place, extractor)(place / "checkpoint").copied["pixels"] == 1.0


def test_distances_are_those_of_the_sampled_images(place, extractor, monkeypatch):
    drawn = images_of(place, "train")
    a_model_that_draws(drawn, monkeypatch)
    found = measure(place, extractor)(place / "checkpoint")
    reference = open_reference(str(place / "test.cache"), 16, extractor, place / "others")
    statistics = accumulate([extractor(drawn)], extractor.space, source="drawn")
    expected = frechet_distance(statistics, reference.statistics)
    values = found.metrics["test"][extractor.space.distance_name]
    assert values["distance"] == pytest.approx(expected, rel=1e-4)
    groups = [statistics_of(rows, extractor.space) for rows in jackknife_groups(extractor(drawn))]
    left_out = jackknife_distances(groups, lambda each: frechet_distance(each, reference.statistics))
    interval = jackknife_interval(expected, left_out)
    assert (values["distance_low"], values["distance_high"]) == pytest.approx(interval, rel=1e-4)
    assert values["kernel_low"] < values["kernel"] < values["kernel_high"]
    loss = {"distance": 0.5, "distance_low": pytest.approx(0.5 - 0.196), "distance_high": pytest.approx(0.5 + 0.196)}
    assert found.metrics["test"][HELD_OUT_LOSS] == loss and HELD_OUT_LOSS not in found.metrics["validation"]


def test_too_few_other_persons_for_the_test_leave_the_share_out(place, extractor, monkeypatch):
    a_model_that_draws(images_of(place, "train"), monkeypatch)
    assert measure(place, extractor, "few")(place / "checkpoint").copied == {}
