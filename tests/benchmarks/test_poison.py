"""What the poisoning benchmark makes of its arms; the arms themselves are not tests."""

import numpy as np
import pytest

from benchmarks.poison.__main__ import ATTACKS, RULES, Job, defences
from benchmarks.poison.arm import Arm, Attack
from benchmarks.poison.scale import NUM_SITES, SCALES, Pictures, Scale
from benchmarks.poison.success import Yardsticks
from benchmarks.poison.summary import summarise
from client.simulated.adversary import Adversary
from server.federation.updates.global_model import GlobalModel
from server.federation.updates.server_optimizer import ServerState
from shared.data.image_set import synthetic_images
from shared.messages.packing import Manifest, pack
from shared.seeding import Streams
from shared.training.weights import new_model, to_numpy

SEEDS = (0, 1)


def outcome(held_out, implant=0.2, backdoor=0.0, **fields):
    return {
        "after": {"held_out": held_out, "implant": implant, "backdoor": backdoor},
        "rises": [0.02, 0.05],
        "rolled_back": [],
        "suspects": [],
        "rounds": 35,
    } | fields


@pytest.fixture
def outcomes():
    """All attacks work without defences, and gain nothing with them."""
    found = {f"{rule}.{attack}.{seed}": outcome(0.10) for rule in RULES for attack in ATTACKS for seed in SEEDS}
    for seed in SEEDS:
        found[f"mean.implant.{seed}"] = found[f"mean.colluding.{seed}"] = outcome(0.12, implant=0.08)
        found[f"mean.backdoor.{seed}"] = outcome(0.12, backdoor=0.9)
        found[f"mean.sign-flip.{seed}"] = found[f"mean.scaled.{seed}"] = outcome(9.0)
    return found


def test_defences_that_hold_everything_reach_the_goal(outcomes):
    text, is_reached = summarise(outcomes, ATTACKS, SEEDS)
    assert is_reached, text
    assert text.startswith("7 of 7 attacks held or named") and "0 of 140 honest rounds undone" in text


@pytest.mark.parametrize(
    ("key", "changed", "words"),
    [
        ("clipped-checked.implant.1", outcome(0.10, implant=0.15), "open: implant"),
        ("clipped-checked.lazy.0", outcome(0.11), "open: lazy"),
        ("mean.backdoor.0", outcome(0.1, backdoor=0.05), "below its rate without defences: backdoor"),
        ("mean-checked.none.1", outcome(0.1, rolled_back=[7]), "1 of 140 honest rounds undone"),
    ],
)
def test_each_goal_that_is_missed_is_named(outcomes, key, changed, words):
    text, is_reached = summarise(outcomes | {key: changed}, ATTACKS, SEEDS)
    assert not is_reached and words in text


def test_an_attack_that_gains_but_is_named_in_every_run_is_no_open_one(outcomes):
    named = {"rolled_back": [2], "suspects": [["site-8"]]}
    one = {"clipped-checked.implant.0": outcome(0.1, implant=0.1, **named)}
    assert "open: implant" in summarise(outcomes | one, ATTACKS, SEEDS)[0]
    both = one | {"clipped-checked.implant.1": outcome(0.1, implant=0.1, **named)}
    assert summarise(outcomes | both, ATTACKS, SEEDS)[1]
    wrong = both | {"clipped-checked.implant.1": outcome(0.1, implant=0.1, rolled_back=[2], suspects=[["site-3"]])}
    assert "open: implant" in summarise(outcomes | wrong, ATTACKS, SEEDS)[0]


def test_the_clipped_rules_are_the_products_default_bound(tmp_path):
    def settings(rule):
        job = Job("small", rule, "none", 0, "", "", tmp_path)
        return SCALES["small"].experiment(0, **defences(job)).federation

    assert (settings("clipped").max_update_norm, settings("clipped").update_norm_action) == ("auto", "clip")
    assert settings("mean").max_update_norm == 0.0


def test_a_round_that_one_site_destroys_is_undone_and_names_it_without_the_bound():
    scale = Scale("test", 8, 1, 2, 0, 2, 6, "", 1, 1)
    images = Pictures(
        tuple(synthetic_images(f"synthetic:site{number}:6", 8) for number in range(NUM_SITES)),
        synthetic_images("synthetic:public:12", 8),
        synthetic_images("synthetic:heldout9:8", 8),
    )
    experiment = scale.experiment(0, max_update_norm=0.0)
    tensors = {name: to_numpy(tensor) for name, tensor in new_model(experiment, Streams(0)).state_dict().items()}
    manifest = Manifest.of(tensors)
    weights, nothing = pack(tensors, manifest), np.zeros(0, np.float32)
    start = GlobalModel(manifest, weights, weights.copy(), Manifest(tensors=()), nothing, 0, 0, ServerState(), (), None)
    attack = Attack("scaled", Adversary(kind="scaled", strength=2000.0))
    arm = Arm(experiment, attack, images, start, is_checked=True)
    found = arm.run(3, Yardsticks(experiment, images, 0), 3)
    assert (found.rolled_back, found.rounds, found.suspects) == ([1, 2], 2, [["site-8"]] * 2)
    assert np.array_equal(arm.model.weights, pack(tensors, manifest))
    assert set(found.after) == {"held_out", "implant", "backdoor"} and len(found.norms) == 2 * (NUM_SITES - 1)
