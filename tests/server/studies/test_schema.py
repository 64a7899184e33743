import json
import tomllib

import pytest

from server.planning.epsilon_forecast import Steps, epsilon
from server.studies.schema import Study
from server.studies.study_files import FOLDER, arm_at, arms_at, load_study, study_names
from shared.errors import InputError
from shared.experiment.config import load_experiment
from shared.experiment.recipes import find_experiment
from shared.training.flops import training_flops

TEXT = """
title = "Small"
question = "?"
[splits]
train = { source = "private", share = 0.5 }
test = { source = "private", share = 0.5 }
[scales.cpu]
generated = 10
synthetic = 40
[arms.scratch]
title = "scratch"
split = "train"
test = "test"
validation = "test"
scales.cpu = { recipe = "reproduce32-T-dsm", images = 100, at = [10, 50] }
"""

SMALL = """
[scales.small]
like = "cpu"
generated = 5
synthetic = 20
"""


def parse(text, tmp_path):
    file = tmp_path / "small.toml"
    file.write_text(text)
    return load_study(str(file))


@pytest.mark.parametrize("name", study_names())
def test_every_study_that_ships_is_valid_and_its_recipes_and_overrides_are_too(name):
    study = load_study(name)
    for arm in study.arms.values():
        for stage in arm.scales.values():
            overrides = [f"{key}={value!r}".replace("'", '"') for key, value in stage.settings.items()]
            assert load_experiment(find_experiment(stage.recipe), overrides)


def test_studies_that_start_from_each_other_divide_the_images_alike():
    divisions = {name: load_study(name) for name in study_names()}
    for study in divisions.values():
        for arm in study.arms.values():
            other, slash, _ = arm.init.rpartition("/")
            if slash:
                assert divisions[other].splits == study.splits
                assert divisions[other].seed == study.seed


def test_federated_arms_see_the_same_images_in_the_same_number_of_steps():
    study = load_study("federated")
    for scale in ("cpu", "gpu"):
        seen, steps = set(), set()
        for name, arm in study.arms.items():
            stage = arm.scales[scale]
            per_step = arm.sites * stage.settings["train.batch"]
            steps.add(stage.images / per_step)
            # A site of the four for itself, and four that take the time of the one, differ in images by intention.
            if name not in ("one-of-four-alone", "four-sites-equal-time"):
                seen.add((stage.images, per_step))
            # Whole rounds, however many steps one has: otherwise an arm would see more.
            assert stage.images % (per_step * stage.settings["federation.local_steps"]) == 0
        assert len(seen) == 1 and len(steps) == 1


def test_scratch_of_the_transfer_study_gets_more_steps_than_both_stages_together():
    study = load_study("transfer")
    for scale in ("cpu", "gpu"):
        masked = load_experiment(find_experiment(study.arms["pretrain-public"].scales[scale].recipe)).train.steps
        for percent in ("10", "1"):
            steps = {}
            for kind in ("scratch", "other", "same"):
                stage = study.arms[f"{kind}-{percent}"].scales[scale]
                batch = stage.settings.get("train.batch") or load_experiment(find_experiment(stage.recipe)).train.batch
                steps[kind] = stage.images / batch
            assert steps["scratch"] > masked + max(steps["other"], steps["same"])


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('question = "?"', 'question = "?"\ncolour = "red"', "unknown key 'colour'"),
        ("images = 100", "images = 100, pictures = 3", "pictures"),
        ('split = "train"', 'split = "nowhere"', "split 'nowhere' is unknown"),
        ('split = "train"', 'split = "train"\ninit = "pretrain"', "init 'pretrain' is no arm"),
        ("share = 0.5", "share = 0.6", "add up to 1.2"),
        ("at = [10, 50]", "at = [50, 10]", "not rising"),
        ("at = [10, 50]", "at = [10, 500]", "at 500 is above images 100"),
        ('validation = "test"\n', "", "both test and validation"),
        ('split = "train"', 'split = "train"\nsites = 2', "sites 2 need init"),
        ('title = "Small"', 'title = "Small', "not valid TOML"),
        ("scales.cpu = {", "scales.tpu = {", "tpu"),
        ('question = "?"', 'question = "?"\nfigures = [{ kind = "ratio", arm = "x", baseline = "scratch" }]', "'x'"),
        ("scales.cpu = {", "scales.gpu = {", "scale 'gpu' is not among the study's scales"),
        (
            'question = "?"',
            'question = "?"\ngrids = [{ title = "g", label = "l", columns = ["a"], rows = { r = [] } }]',
            "one arm for each of the 1 columns",
        ),
        ("images = 100", 'init = "none", images = 100', "init 'none' is no arm"),
        ("synthetic = 40", 'synthetic = 40\nlike = "cpu"', "like 'cpu' is no other scale"),
        ("synthetic = 40", 'synthetic = 40\nlike = "gpu"', "like 'gpu' is no other scale"),
        ("synthetic = 40", f"synthetic = 40\n{SMALL}\nimages_share = 0", "images_share"),
        ("synthetic = 40", 'synthetic = 40\nsettings = { "train.seed" = 3 }', "train.seed is what"),
        ("images = 100, at = [10, 50] }\n", f"settings = {{ }} }}\n{SMALL}images_share = 0.5\n", "to take a share of"),
    ],
)
def test_a_wrong_study_is_refused_in_one_line_that_names_the_key(old, new, words, tmp_path):
    assert old in TEXT
    with pytest.raises(InputError) as refusal:
        parse(TEXT.replace(old, new), tmp_path)
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_right_study_is_read_and_says_what_it_has(tmp_path):
    study = parse(TEXT, tmp_path)
    assert study == Study.model_validate(tomllib.loads(TEXT))
    assert arms_at(study, "small", "cpu") == ["scratch"]
    assert arm_at(study, "small", "scratch", "cpu")[1].at == (10, 50)
    for arm, scale, words in (
        ("none", "cpu", "no arm 'none': it has scratch"),
        ("scratch", "tpu", "scale 'tpu' is unknown: give one of small, cpu, gpu, paper"),
        ("scratch", "gpu", "no scale 'gpu': it has cpu"),
    ):
        with pytest.raises(InputError, match=words):
            arm_at(study, "small", arm, scale)
    with pytest.raises(InputError, match="no scale 'paper'"):
        arms_at(study, "small", "paper")


def test_a_scale_may_have_the_arms_of_another_with_a_share_of_their_images(tmp_path):
    cpu = 'synthetic = 40\nsettings = { "optim.lr" = 1e-3, "evaluation.steps" = 250, "train.batch" = 16 }\n'
    small = f'{SMALL}images_share = 0.25\nsettings = {{ "evaluation.steps" = 20, "optim.warmup_steps" = 3 }}\n'
    own = (
        'scales.cpu = { recipe = "reproduce32-T-dsm", settings = { "train.batch" = 8 }, images = 100, at = [1, 3, 50] }'
    )
    old = 'scales.cpu = { recipe = "reproduce32-T-dsm", images = 100, at = [10, 50] }'
    study = parse(TEXT.replace("synthetic = 40\n", cpu + small).replace(old, own), tmp_path)
    stage = study.arms["scratch"].scales["small"]
    assert stage.settings == {
        "optim.lr": 1e-3, "evaluation.steps": 20, "optim.warmup_steps": 3, "train.batch": 8
    }  # fmt: skip
    # Rounded, each once, and never nothing.
    assert (stage.images, stage.at) == (25, (1, 12))
    assert study.arms["scratch"].scales["cpu"].settings == {
        "optim.lr": 1e-3, "evaluation.steps": 250, "train.batch": 8
    }  # fmt: skip
    assert arms_at(study, "small", "small") == ["scratch"]
    other = parse(
        TEXT.replace("synthetic = 40\n", cpu + small).replace(
            old, f'{own}\nscales.small = {{ recipe = "reproduce32-T-msm", images = 7 }}'
        ),
        tmp_path,
    )
    assert other.arms["scratch"].scales["small"].recipe == "reproduce32-T-msm"
    assert other.arms["scratch"].scales["small"].settings == {"evaluation.steps": 20, "optim.warmup_steps": 3}


@pytest.mark.full_size
def test_the_arms_of_our_recipe_have_equal_operations_and_a_third_of_them_on_the_way():
    study = load_study("fast")
    for scale in ("small", "cpu"):
        spent = {}
        for name, arm in study.arms.items():
            stage = arm.scales[scale]
            overrides = [f"{key}={json.dumps(value)}" for key, value in stage.settings.items()]
            each = training_flops(load_experiment(find_experiment(stage.recipe), overrides))
            before = spent.get(arm.init, 0.0)
            spent[name] = before + stage.images * each
            if name in ("fast", "fast-muon", "fast-scratch"):
                assert before + stage.at[0] * each == pytest.approx(spent["paper"] / 3, rel=0.01)
        ends = [spent[name] for name, arm in study.arms.items() if arm.test]
        assert max(ends) < 1.01 * min(ends)


def test_private_arms_stay_below_the_epsilon_that_they_are_named_after():
    study, found = load_study("private"), {}
    for name, arm in study.arms.items():
        if not name.startswith("dp-"):
            continue
        stage = arm.scales["cpu"]
        overrides = [f"{key}={json.dumps(value)}" for key, value in stage.settings.items()]
        experiment = load_experiment(find_experiment(stage.recipe), overrides)
        privacy, federation = experiment.privacy, experiment.federation
        rounds = stage.images / (arm.sites * federation.local_steps * experiment.train.batch)
        # Whole rounds, and as many images counted as a step is meant to have.
        assert rounds == federation.rounds == 3
        assert privacy.expected_batch == experiment.train.batch and privacy.mechanism == "dp-sgd"
        steps = Steps(privacy.noise_multiplier, privacy.sample_rate, 3 * federation.local_steps)
        found[name] = epsilon([steps], privacy.delta)
    assert set(found) == {"dp-image", "dp-person", "dp-three-sites", "dp-after-masked"}
    assert all(6 < each <= 8 for each in found.values()), found


def test_an_unknown_study_is_refused_with_the_known_ones():
    with pytest.raises(
        InputError,
        match="study 'none' is unknown: known are acceleration, fast, federated, key-factors, private, transfer",
    ):
        load_study("none")
    names = ["acceleration", "fast", "federated", "key-factors", "private", "transfer"]
    assert sorted(path.stem for path in FOLDER.glob("*.toml")) == study_names() == names


def test_key_factors_holds_every_arm_of_the_papers_study():
    study, seen = load_study("key-factors"), set()
    for name, arm in study.arms.items():
        stage = arm.scales.get("paper")
        if stage is None:
            continue
        experiment = load_experiment(
            find_experiment(stage.recipe), [f"{key}={json.dumps(value)}" for key, value in stage.settings.items()]
        )
        assert experiment.diffusion.prediction == "eps"
        assert (experiment.evaluation.sampler, experiment.evaluation.steps) == ("ddim", 250)
        assert not experiment.evaluation.rederive_eps
        mask, start = experiment.mask, study.arms[arm.init] if arm.init else None
        block = mask.block_size if mask.kind == "block" else 0
        if mask.kind != "none":
            seen.add((mask.kind, mask.ratio, block, experiment.train.steps, experiment.diffusion.schedule))
            assert start is None, name
        elif start is not None:
            before = start.scales["paper"].settings.get("train.steps", 50_000)
            assert before + experiment.train.steps == 200_000, name
        else:
            assert experiment.train.steps == 200_000, name
    masks = [("patch", 0), ("crop", 0), ("block", 2), ("block", 4), ("block", 8)]
    wanted = {(kind, ratio, block, 50_000, "linear") for kind, block in masks for ratio in (0.1, 0.5, 0.9)}
    # Of four blocks of 8, 10 percent hide none, in the authors' code as well.
    wanted -= {("block", 0.1, 8, 50_000, "linear")}
    wanted |= {("block", ratio, 4, steps, "linear") for ratio in (0.1, 0.5) for steps in (100_000, 150_000)}
    assert seen == wanted | {("block", 0.9, 4, 50_000, "cosine")}
    # Every masked start is fine-tuned, but those of the hyper-parameters.
    fine_tuned = {arm.init for arm in study.arms.values()}
    others = {"msm-block4-90-cosine", "msm-block4-90-lr-half", "msm-block4-90-batch-half", "msm-block4-90-clipped"}
    assert {name for name in study.arms if name.startswith("msm")} - fine_tuned == others | {"msm-block4-90-unclipped"}
