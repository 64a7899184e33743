"""How long arms take: by hand, and what has a result already."""

import re

import pytest

from server.studies.run import estimate as module
from server.studies.run.estimate import estimate
from server.studies.study_files import load_study
from shared.errors import InputError
from shared.training.flops import train_flops

STUDY = """
title = "Small"
question = "?"
[splits]
train = { source = "private", share = 0.5 }
test = { source = "private", share = 0.5 }
[scales.cpu]
generated = 100
synthetic = 40
[arms.pretrain]
title = "masked"
split = "train"
scales.cpu = { recipe = "reproduce32-T-msm", images = 6400 }
[arms.after]
title = "after"
split = "train"
test = "test"
validation = "test"
init = "pretrain"
[arms.after.scales.cpu]
recipe = "reproduce32-T-dsm"
images = 3200
at = [1600]
settings = { "evaluation.sampler" = "ddim", "evaluation.steps" = 30 }
"""


@pytest.fixture
def study(tmp_path):
    file = tmp_path / "small.toml"
    file.write_text(STUDY)
    return load_study(str(file))


def test_training_and_sampling_are_counted_in_operations(study, tmp_path, monkeypatch):
    seen = []

    def probe(experiment, _seconds):
        seen.append(experiment)
        return 64.0

    monkeypatch.setattr(module, "images_per_second", probe)
    line = estimate(study, "small", ["pretrain", "after"], "cpu", tmp_path)
    assert len(seen) == 1, "one probe for all arms"
    masked, whole = (train_flops(each) for each in (seen[0], seen[0].model_copy(update={"mask": _no_mask()})))
    training = (6400 + 3200 * whole / masked) / 64
    # Two places, a hundred images each, thirty evaluations of a third of a step.
    sampling = 2 * 100 * 30 * whole / masked / 3 / 64
    found = [int(each) for each in re.findall(r"(\d+) (?:seconds|minutes)", line)]
    expected = [each if each < 120 else each / 60 for each in (training, sampling)]
    assert found == [round(each) for each in expected]
    assert line.startswith("estimate for 2 of 2 arms")


def test_arms_with_a_result_are_not_counted(study, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "images_per_second", lambda *_: 1.0)
    for name in ("pretrain", "after"):
        folder = tmp_path / "small-cpu" / name
        folder.mkdir(parents=True)
        (folder / "result.json").touch()
        line = estimate(study, "small", ["pretrain", "after"], "cpu", tmp_path)
    assert line == "estimate: every arm has its result"
    # The end of a done arm that has none is sampled, and nothing else; masked pre-training is not measured.
    line = estimate(study, "small", ["pretrain", "after"], "cpu", tmp_path, end_images=100_000)
    assert line.startswith("estimate for 1 of 2 arms on this machine: 0 seconds of training, ") and "days" in line
    (tmp_path / "small-cpu" / "after" / "points").mkdir()
    (tmp_path / "small-cpu" / "after" / "points" / "end.json").touch()
    line = estimate(study, "small", ["pretrain", "after"], "cpu", tmp_path, end_images=100_000)
    assert line == "estimate: every arm has its result"
    with pytest.raises(InputError, match="has no arm 'other'"):
        estimate(study, "small", ["other"], "cpu", tmp_path)


def _no_mask():
    from shared.experiment.sections import MaskConfig

    return MaskConfig()
