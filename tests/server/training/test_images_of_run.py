import json

import numpy as np
import pytest

from server.runs.run_directory import create
from server.training.images_of_run import check_images
from shared.data.image_set import ImageCache
from shared.errors import InputError
from shared.experiment.config import parse_experiment


def images(count, value=0):
    pixels = np.full((count, 3, 8, 8), value, np.uint8)
    return ImageCache(lambda: pixels, count, 8)


@pytest.fixture
def run(tmp_path):
    return create(tmp_path / "run", parse_experiment(""))


def test_the_same_images_go_on_wherever_they_lie(run):
    assert check_images(run, images(4), "first", step=0) == ""
    assert check_images(run, images(4), "copy", step=7) == ""
    assert [each["data"] for each in json.loads((run.path / "images.json").read_text())] == ["first"]


@pytest.mark.parametrize("other", [images(5), images(3), images(4, value=1)])
def test_other_images_are_refused_or_recorded(run, other):
    check_images(run, images(4), "first", step=0)
    with pytest.raises(InputError, match=r"4 images of first before, \d other ones of second now.*--accept-other-data"):
        check_images(run, other, "second", step=7)
    assert "4 images of first before" in check_images(run, other, "second", step=7, accept_other=True)
    assert check_images(run, other, "second", step=9) == ""
    record = json.loads((run.path / "images.json").read_text())
    assert [(each["num_images"], each["from_step"]) for each in record] == [(4, 0), (len(other), 7)]


def test_before_the_first_step_any_images_may_be_named(run):
    check_images(run, images(4), "first", step=0)
    assert check_images(run, images(5), "second", step=0) == ""
    assert check_images(run, images(5), "second", step=3) == ""


@pytest.mark.parametrize("damaged", ["{", "[1]", '[{"fingerprint": 1}]', "null"])
def test_a_damaged_record_is_one_line(run, damaged):
    (run.path / "images.json").write_text(damaged)
    with pytest.raises(InputError, match="is damaged"):
        check_images(run, images(4), "first", step=3)
