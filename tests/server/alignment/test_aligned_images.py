"""The aligned set: what it holds, whose it is, and that training opens it."""

from pathlib import Path

import numpy as np
import pytest

from server.alignment.aligned_images import align_images
from server.alignment.fit import fit
from server.alignment.mean_images import MeanImage
from server.runs.lineage import MeanImageCharge, charges_of_images
from shared.data.image_cache import open_images
from shared.errors import InputError

PUBLIC = "synthetic:public:7"
CHARGES = [
    MeanImageCharge(run="align-1", num_sites=2, unit="person", noise_multiplier=3.73, delta=1e-5, epsilon=1.01),
]


def mean_image(site: str, value: float, size: int = 16) -> MeanImage:
    return MeanImage(site, np.full((3, size, size), value), 1e-3)


def test_sites_take_turns_and_training_opens_the_set(tmp_path: Path):
    public = open_images(PUBLIC, 16)
    means, said = [mean_image("dark", -0.5), mean_image("bright", 0.5)], []
    found = align_images(public, means, CHARGES, tmp_path / "aligned", said.append)
    again = open_images(tmp_path / "aligned", 16)
    np.testing.assert_array_equal(again.images, found.images)
    assert len(again) == 7 and again.fingerprint == found.fingerprint != public.fingerprint
    centre = (public.images / 127.5 - 1).mean(0)
    for turn, mean in enumerate(means):
        expected = fit(centre, mean.pixels, mean.deviation)(public.images[turn::2])
        np.testing.assert_array_equal(again.images[turn::2], expected)
    assert [line.partition(":")[0] for line in said] == ["dark", "bright"]
    assert list(charges_of_images(tmp_path / "aligned")) == CHARGES
    with pytest.raises(InputError, match="16 x 16 pixels"):
        open_images(tmp_path / "aligned", 32)


def test_nothing_is_written_over(tmp_path: Path):
    (tmp_path / "aligned").mkdir()
    (tmp_path / "aligned" / "mine").touch()
    with pytest.raises(InputError, match="not empty"):
        align_images(open_images(PUBLIC, 16), [mean_image("a", 0.0)], [], tmp_path / "aligned")


def test_mean_images_of_another_size_are_refused(tmp_path: Path):
    with pytest.raises(InputError, match="32 pixels, the public ones 16"):
        align_images(open_images(PUBLIC, 16), [mean_image("a", 0.0, 32)], [], tmp_path / "aligned")
    assert not (tmp_path / "aligned").exists()
