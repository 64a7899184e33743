"""The experiment file: what it accepts, what it refuses and how it says so."""

from pathlib import Path

import pytest
from pydantic import Field, ValidationError

from shared.errors import InputError
from shared.experiment.base import Section
from shared.experiment.config import Experiment, load_experiment, parse_experiment

SECURE = "[federation]\nsecure = true\n"


def test_a_resolved_experiment_reads_back_equal():
    experiment = parse_experiment('[train]\nobjective = "msm"\n[mask]\nkind = "block"\nratio = 0.9')
    assert parse_experiment(experiment.to_toml()) == experiment


def test_secure_alone_turns_masks_on_and_nothing_else_changes_its_defaults():
    masked = parse_experiment("", ["federation.secure=true"]).federation
    assert (masked.update_norm_action, masked.min_replies) == ("clip", 3)
    plain = parse_experiment("[federation]\nsecure = false\n").federation
    assert (plain.update_norm_action, plain.min_replies) == ("reject", 2)
    four = parse_experiment("[federation]\nsecure = true\nmin_replies = 4\n").federation
    assert (four.update_norm_action, four.min_replies) == ("clip", 4)


def test_overrides_win_over_the_file_and_keep_their_types(tmp_path: Path):
    path = tmp_path / "e.toml"
    path.write_text("[optim]\nlr = 0.1\n")
    experiment = load_experiment(path, ["optim.lr=0.5", "train.init=some/where", "data.horizontal_flip=false"])
    assert experiment.optim.lr == 0.5
    assert experiment.train.init == "some/where"
    assert experiment.data.horizontal_flip is False
    path.write_bytes(b"\xef\xbb\xbf[optim]\r\nlr = 0.25\r\n")
    assert load_experiment(path).optim.lr == 0.25, "as editors for Windows save it"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("surprise = 1", "unknown key 'surprise'"),
        ("[model]\nimage_sise = 32", "unknown key 'model.image_sise': is 'model.image_size' meant?"),
        ("[modle]\nimage_size = 32", "unknown key 'modle': is 'model' meant?"),
        ("[train]\nlr = 0.1", "unknown key 'train.lr': is 'optim.lr' meant?"),
        ("[optim]\nweights = 0.1", "unknown key 'optim.weights': remove it"),
        ("[model]\nimage_size = 33", "give 32"),
        ('[data]\nwavelet = "haar"\n[model]\nimage_size = 36', "after the wavelet: give 32"),
        ("[mask]\nratio = 0.5", "give both or neither"),
        ('[data]\nwavelet_tokens = "split"', "'split' needs wavelet bands: give wavelet 'haar'"),
        (
            '[data]\nwavelet = "haar"\nwavelet_tokens = "split"\n[model]\nbackbone = "unet"',
            "it needs 'uvit' and no mask",
        ),
        (
            '[data]\nwavelet = "haar"\nwavelet_tokens = "split"\n[train]\nobjective = "msm"\n'
            '[mask]\nkind = "crop"\nratio = 0.5',
            "'split' does not go with model.backbone 'uvit' and mask.kind 'crop'",
        ),
        ('[train]\nobjective = "msm"\n[mask]\nkind = "crops"\nratio = 0.9', "is above 0.825, what 'crops' hide"),
        (
            '[train]\nobjective = "msm"\n[model]\nimage_size = 24\n[mask]\nkind = "crops"\nratio = 0.4',
            "divides by 4, not 6 x 6",
        ),
        (
            '[train]\nobjective = "msm"\n[mask]\nkind = "crops"\nratio = 0.4\n[privacy]\nmechanism = "dp-sgd"',
            "'crops' does not go with privacy dp-sgd",
        ),
        ('[model]\nbackbone = "unet"\npatch_init = "uniform"', "it embeds no patches"),
        ('[mask]\nkind = "block"\nratio = 0.5', "msm needs a mask"),
        (
            '[train]\nobjective = "msm"\n[mask]\nkind = "block"\nratio = 0.5\nblock_size = 3',
            "does not divide the 8 x 8",
        ),
        ('[train]\nobjective = "msm"\n[mask]\nkind = "block"\nratio = 0.2', "raise the ratio"),
        ('[train]\nobjective = "msm"\n[mask]\nkind = "crop"\nratio = 0.99', "lower the ratio"),
        ("[federation]\nsites_per_round = 1", "min_replies 2 is above sites_per_round 1"),
        (
            "[federation]\nsecure = true\nupdate_norm_action = 'reject'",
            "update_norm_action 'reject' does not go with secure",
        ),
        (f"{SECURE}weighting = 'examples'", "nobody can check what one site claims to weigh: use equal"),
        (
            "[federation]\nsecure = true\nmin_replies = 2",
            "of a sum of two each site could take its own away",
        ),
        (f"{SECURE}max_norm_ratio = 1.5", "max_norm_ratio 1.5 does not go with secure: nobody sees one update"),
        (f"{SECURE}max_persistence = 0.2", "max_persistence 0.2 does not go with secure: nobody sees one update"),
        ("[federation]\nmax_persistence = 1.5", "federation.max_persistence"),
        ("[federation]\nmax_norm_ratio = -1", "federation.max_norm_ratio"),
        (f"{SECURE}sites_per_round = 4", "all sites of the roster have to be asked"),
        (f"{SECURE}sites_fraction = 0.5", "all sites of the roster have to be asked"),
        (
            "[model]\nbackbone = 'unet'\n[optim]\noptimizer = 'muon'",
            "optim.optimizer 'muon' does not go with model.backbone 'unet'",
        ),
        (
            "[federation]\nsecure = true\nwire_dtype = 'int8'",
            "wire_dtype 'int8' does not go with secure: masks need one grid",
        ),
        (
            "[federation]\nwire_dtype = 'int8'\n[privacy]\nmechanism = 'dp-sgd'",
            "wire_dtype 'int8' does not go with privacy dp-sgd",
        ),
        ("[federation]\nsecure_bits = 16", "federation.secure_bits = 16"),
        ("[evaluation]\nsteps = 1001", "at most 1000"),
        ("[train]\nbatch = 0", "train.batch = 0"),
        # What may have several forms is told with all of them; equal values of two settings are not mixed up.
        (
            "[federation]\nserver_lr = 0",
            "federation.server_lr = 0: Input should be 'auto' or input should be greater than 0",
        ),
        (
            "[federation]\nrounds = -1\nlocal_steps = -1",
            "federation.rounds = -1: Input should be greater than or equal to 1",
        ),
        # Checked before anything counts up to them: whoever asks must not keep a site busy for ever.
        ("[diffusion]\ntimesteps = 1000000000000000000", "less than or equal to 100000"),
        ("[model]\nimage_size = 1000000000", "less than or equal to 4096"),
        ("not toml", "not valid TOML"),
        (f"[train]\nseed = {'9' * 5000}\n", "not valid TOML"),
    ],
)
def test_bad_experiments_are_one_line_with_the_key_and_the_remedy(text: str, said: str):
    with pytest.raises(InputError) as caught:
        parse_experiment(text)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_bad_override_are_named(tmp_path: Path):
    with pytest.raises(InputError, match="No such file"):
        load_experiment(tmp_path / "none.toml")
    with pytest.raises(InputError, match=r"section\.key=value"):
        parse_experiment("", ["lr"])
    with pytest.raises(InputError, match="sets more than one value"):
        parse_experiment("", ["train.batch=8\n[optim]\nlr=0.5"])


@pytest.mark.parametrize("given", ["train.batch=true", "optim.lr=true", "optim.betas=[true, 0.5]", "train.seed=false"])
def test_true_and_false_are_no_numbers(given: str):
    with pytest.raises(InputError, match="give a number, not true or false"):
        parse_experiment("", [given])


@pytest.mark.parametrize(
    ("kind", "ratio", "size", "block", "visible"),
    [
        ("block", 0.9, 64, 4, 32),  # the authors' rounding: 0.9 hides 14 of 16 blocks
        ("block", 0.5, 64, 4, 128),
        ("block", 0.9, 256, 4, 416),
        ("block", 0.9, 128, 4, 112),
        ("patch", 0.9, 64, 4, 26),
        ("crop", 0.75, 64, 4, 64),
        ("none", 0.0, 64, 4, 256),
    ],
)
def test_the_number_of_visible_patches_follows_the_authors_rounding(
    kind: str, ratio: float, size: int, block: int, visible: int
):
    experiment = parse_experiment(
        f'[train]\nobjective = "{"dsm" if kind == "none" else "msm"}"\n[model]\nimage_size = {size}\n'
        f'[mask]\nkind = "{kind}"\nratio = {ratio}\nblock_size = {block}'
    )
    assert experiment.num_visible == visible
    assert experiment.realised_mask_ratio == 1 - visible / experiment.grid_size**2


def test_a_wavelet_halves_the_grid_and_makes_twelve_channels():
    experiment = parse_experiment('[data]\nwavelet = "haar"\n[model]\nimage_size = 256')
    assert (experiment.grid_size, experiment.in_channels) == (32, 12)
    assert Experiment().in_channels == 3


def test_two_sequences_have_twice_the_tokens_and_as_many_channels():
    experiment = parse_experiment('[model]\nimage_size = 64\n[data]\nwavelet = "haar"\nwavelet_tokens = "split"')
    assert (experiment.num_tokens, experiment.num_visible, experiment.sequences) == (128, 64, (3, 9))
    joint = parse_experiment('[model]\nimage_size = 64\n[data]\nwavelet = "haar"')
    assert (joint.num_tokens, joint.num_visible, joint.sequences) == (64, 64, (12,))


def test_a_word_is_no_number_wherever_it_stands():
    class Numbers(Section):
        one: int = 0
        some: dict[str, float] = Field(default_factory=dict)
        several: tuple[float, ...] = ()
        any_of_them: dict[str, bool | float] = Field(default_factory=dict)

    assert Numbers(any_of_them={"a": True, "b": 2.5}).any_of_them == {"a": True, "b": 2.5}
    for wrong in ({"one": True}, {"some": {"a": 1.0, "b": False}}, {"several": [1, True]}):
        with pytest.raises(ValidationError, match="give a number, not true or false"):
            Numbers(**wrong)
