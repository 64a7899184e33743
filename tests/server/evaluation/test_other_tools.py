import zipfile

import numpy as np
import pytest
import torch

from server.evaluation.other_tools import read_arrays
from server.evaluation.reference import open_reference
from shared.errors import InputError
from shared.evaluation.extractor import Extractor
from shared.evaluation.feature_statistics import INCEPTION_2015_SHA256, FeatureSpace, statistics_of
from shared.evaluation.frechet import frechet_distance

RNG = np.random.default_rng(5)
WIDTH = 6
INCEPTION = FeatureSpace("inception-v3-compat", "2048", INCEPTION_2015_SHA256)


def network(space=INCEPTION):
    """Means over pixels and over rows stand for the features."""
    return Extractor(space, WIDTH, lambda x: torch.cat([x.float().mean((2, 3)), x.float()[:, :, 0].mean(2)], 1))


def opened(path, tmp_path, space=INCEPTION, size=8):
    return open_reference(str(path), size, network(space), tmp_path / "kept")


def moments(features):
    return {"mu": features.mean(0), "sigma": np.cov(features, rowvar=False)}


def test_mean_and_covariance_of_another_tool_give_the_distance_to_its_images(tmp_path):
    theirs, ours = RNG.normal(size=(40, WIDTH)), RNG.normal(size=(30, WIDTH)) + 0.7
    np.savez(tmp_path / "stats.npz", **moments(theirs))
    reference = opened(f"{tmp_path / 'stats.npz'}:40", tmp_path)
    expected = frechet_distance(statistics_of(ours, INCEPTION), statistics_of(theirs, INCEPTION))
    assert frechet_distance(statistics_of(ours, INCEPTION), reference.statistics) == pytest.approx(expected, rel=1e-9)
    assert reference.statistics.n == 40 and reference.features_ND is None


def test_mean_and_covariance_need_their_count_and_inception(tmp_path):
    np.savez(tmp_path / "stats.npz", **moments(RNG.normal(size=(40, WIDTH))))
    for path, space, words in (
        ("stats.npz", INCEPTION, r"give --reference .*stats\.npz:<number>"),
        ("stats.npz:1", INCEPTION, "of how many images"),
        ("stats.npz:40", FeatureSpace("random-inception", "192", "ab"), "not of random-inception"),
    ):
        with pytest.raises(InputError, match=words):
            opened(tmp_path / path, tmp_path, space)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mu": np.zeros(3)}, r"mu \(3,\)"),
        ({"sigma": np.arange(36.0).reshape(6, 6)}, "no covariance"),
        ({"sigma": -np.eye(6)}, "no covariance"),
        ({"sigma": np.eye(6) + 2 * np.eye(6)[::-1]}, "a variance of -1"),
        ({"mu": np.array(list("abcdef"))}, "mu holds <U1"),
        ({"sigma": np.eye(6, dtype=complex)}, "sigma holds complex128"),
        ({"mu": np.full(6, np.nan)}, "not finite"),
    ],
)
def test_moments_that_are_none_are_refused(tmp_path, change, words):
    np.savez(tmp_path / "stats.npz", **{**moments(RNG.normal(size=(40, WIDTH))), **change})
    with pytest.raises(InputError, match=words):
        opened(f"{tmp_path / 'stats.npz'}:40", tmp_path)


@pytest.mark.parametrize("layout", ["first.npy", "last.npy", "adm.npz"])
def test_arrays_of_images_are_references(tmp_path, layout):
    images = RNG.integers(0, 256, (5, 3, 8, 8), np.uint8)
    path = tmp_path / layout
    stored = images if layout == "first.npy" else images.transpose(0, 2, 3, 1)
    if layout == "adm.npz":
        np.savez(path, stored)
    else:
        np.save(path, stored)
    reference = opened(path, tmp_path)
    np.testing.assert_allclose(reference.features_ND, network()(torch.from_numpy(images)), rtol=1e-6)
    assert len(reference.image_digests) == 5


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((4, 3, 9, 9), np.uint8), "9 x 9 pixels, 8 x 8 are compared"),
        (np.zeros((4, 3, 8, 8), np.float32), r"float32 \(4, 3, 8, 8\): give uint8"),
        (np.zeros((4, 8, 8), np.uint8), "give uint8"),
        (np.zeros((4, 1, 8, 8), np.uint8), "give uint8"),
        (np.zeros((1, 3, 8, 8), np.uint8), "at least 2"),
        (np.zeros((0, 3, 8, 8), np.uint8), r"uint8 \(0, 3, 8, 8\): give uint8"),
        (np.zeros((2, 3, 0, 0), np.uint8), "give uint8"),
    ],
)
def test_other_arrays_are_refused(tmp_path, array, words):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(InputError, match=words):
        opened(tmp_path / "a.npy", tmp_path)


def test_files_that_run_code_are_damaged_or_hold_something_else_are_one_line(tmp_path):
    np.save(tmp_path / "pickled.npy", np.array([print], object), allow_pickle=True)
    (tmp_path / "text.npz").write_text("x")
    np.savez(tmp_path / "cut.npz", **moments(RNG.normal(size=(40, WIDTH))))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:200])
    np.savez(tmp_path / "other.npz", act=np.zeros(3), labels=np.zeros(3))
    for name, members in (("pictures.npz", ["1.png"]), ("texts.npz", ["mu", "sigma"])):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for member in members:
                archive.writestr(member, b"x")
    for name, words in (
        ("pictures.npz", "'1.png' in it is no array"),
        ("texts.npz", "'mu' in it is no array"),
        ("pickled.npy", "no array file"),
        ("text.npz", "no array file"),
        ("cut.npz", "no array file"),
        ("none.npy", "No such file"),
        ("other.npz", "holds 'act', 'labels'; give mu and sigma"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            read_arrays(tmp_path / name)
        assert "\n" not in str(caught.value)
