"""What the poisoning benchmark makes of its arms; the arms themselves are not tests."""

import numpy as np
import pytest

from benchmarks.poison.__main__ import ATTACKS, RULES, Job, defences, is_tried
from benchmarks.poison.arm import Arm, Attack
from benchmarks.poison.scale import NUM_SITES, SCALES, Pictures, Scale
from benchmarks.poison.success import Yardsticks
from benchmarks.poison.summary import summarise
from client.simulated.adversary import Adversary
from server.federation.acceptance.crowd import MAX_NORM_RATIO, MAX_PERSISTENCE, Crowd
from server.federation.acceptance.persistence import LEAST_ROUNDS
from server.federation.updates.global_model import GlobalModel
from server.federation.updates.server_optimizer import ServerState
from shared.data.image_set import synthetic_images
from shared.messages.packing import Manifest, pack
from shared.seeding import Streams
from shared.training.weights import new_model, to_numpy
from tests.server.fake_federation import make_experiment

SEEDS = (0, 1)


def outcome(held_out, implant=0.2, backdoor=0.0, **fields):
    return {
        "after": {"held_out": held_out, "implant": implant, "backdoor": backdoor},
        "rises": [0.02, 0.05],
        "rolled_back": [],
        "suspects": [],
        "named": [],
        "least_shares": {},
        "persistence": [{"median": 0.01, "largest": 0.05, "site": "site-3"}],
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
    assert text.startswith("8 of 8 attacks held or named") and "0 of 70 honest rounds undone" in text
    assert "0 honest sites named (needs 0), largest honest persistence 0.040 above the median" in text


@pytest.mark.parametrize(
    ("key", "changed", "words"),
    [
        ("crowd-checked.implant.1", outcome(0.10, implant=0.15), "open: implant"),
        ("crowd-checked.careful.1", outcome(0.10, implant=0.15), "open: careful"),
        ("crowd-checked.lazy.0", outcome(0.11), "open: lazy"),
        ("crowd-checked.none.0", outcome(0.10, named=[[4, "site-2"]]), "1 honest sites named"),
        ("crowd-checked.stale.1", outcome(0.10, named=[[4, "site-8"], [6, "site-2"]]), "1 honest sites named"),
        ("mean.backdoor.0", outcome(0.1, backdoor=0.05), "below its rate without defences: backdoor"),
        ("crowd-checked.none.1", outcome(0.1, rolled_back=[7]), "1 of 70 honest rounds undone"),
    ],
)
def test_each_goal_that_is_missed_is_named(outcomes, key, changed, words):
    text, is_reached = summarise(outcomes | {key: changed}, ATTACKS, SEEDS)
    assert not is_reached and words in text


def test_an_attack_that_gains_but_is_named_in_every_run_is_no_open_one(outcomes):
    one = {"crowd-checked.implant.0": outcome(0.1, implant=0.1, rolled_back=[2], suspects=[["site-8"]])}
    assert "open: implant" in summarise(outcomes | one, ATTACKS, SEEDS)[0]
    both = one | {"crowd-checked.implant.1": outcome(0.1, implant=0.1, named=[[5, "site-8"]])}
    text, is_reached = summarise(outcomes | both, ATTACKS, SEEDS)
    assert is_reached and "named in 2 of 2 runs, after round 5 at the latest" in text
    for wrong in ({"named": [[5, "site-3"]]}, {"rolled_back": [2], "suspects": [["site-3"]]}):
        misled = both | {"crowd-checked.implant.1": outcome(0.1, implant=0.1, **wrong)}
        assert "open: implant" in summarise(outcomes | misled, ATTACKS, SEEDS)[0]


def test_an_honest_site_with_other_photographs_may_be_doubted_and_the_line_says_how_much(outcomes):
    doubted = outcome(0.1, named=[[4, "site-8"]], least_shares={"site-8": 0.75})
    text, is_reached = summarise(outcomes | {"crowd-checked.foreign.1": doubted}, ATTACKS, SEEDS)
    assert is_reached and "another data set doubted in 1 of 2 runs, counts 75% at least" in text


def test_no_arm_is_run_that_nothing_is_read_of():
    tried = {name: {rule for rule in RULES if is_tried(rule, each)} for name, each in ATTACKS.items()}
    assert tried["foreign"] == {"crowd-checked"} and tried["none"] == {"mean", "crowd-checked"}
    assert tried["careful"] == {"clipped-checked", "crowd-checked"} and tried["scaled"] == set(RULES)
    assert tried["implant"] == set(RULES) - {"mean-checked"}


def test_of_two_that_act_together_both_have_to_be_named(outcomes):
    gains = {f"crowd-checked.colluding.{seed}": outcome(0.1, implant=0.1, named=[[4, "site-7"]]) for seed in SEEDS}
    assert "open: colluding" in summarise(outcomes | gains, ATTACKS, SEEDS)[0]
    both = [[4, "site-7"], [6, "site-8"]]
    gains = {f"crowd-checked.colluding.{seed}": outcome(0.1, implant=0.1, named=both) for seed in SEEDS}
    assert summarise(outcomes | gains, ATTACKS, SEEDS)[1]


def test_each_rule_is_what_the_product_has_on(tmp_path):
    def settings(rule):
        job = Job("small", rule, "none", 0, "", "", tmp_path)
        return SCALES["small"].experiment(0, **defences(job)).federation

    def looks(rule):
        crowd = Crowd(tmp_path, make_experiment(**settings(rule).model_dump()))
        return crowd.max_ratio, crowd.max_persistence

    for rule in ("clipped-checked", "crowd-checked"):
        assert (settings(rule).max_update_norm, settings(rule).update_norm_action) == ("auto", "clip")
    assert settings("mean").max_update_norm == 0.0
    assert looks("mean") == looks("clipped-checked") == (0.0, 0.0)
    assert looks("crowd-checked") == (MAX_NORM_RATIO, MAX_PERSISTENCE)


def arm_of(attack, **federation):
    """Nine sites of six pictures of 8 pixels, one step a round."""
    scale = Scale("test", 8, 1, 2, 0, 2, 6, "", 1, 1)
    images = Pictures(
        tuple(synthetic_images(f"synthetic:site{number}:6", 8) for number in range(NUM_SITES)),
        synthetic_images("synthetic:public:12", 8),
        synthetic_images("synthetic:heldout9:8", 8),
    )
    experiment = scale.experiment(0, **federation)
    tensors = {name: to_numpy(tensor) for name, tensor in new_model(experiment, Streams(0)).state_dict().items()}
    manifest = Manifest.of(tensors)
    weights, nothing = pack(tensors, manifest), np.zeros(0, np.float32)
    start = GlobalModel(manifest, weights, weights.copy(), Manifest(tensors=()), nothing, 0, 0, ServerState(), (), None)
    return Arm(experiment, attack, images, start, is_checked=True), Yardsticks(experiment, images, 0)


def test_a_round_that_one_site_destroys_is_undone_and_names_it_without_the_bound():
    blind = {"max_update_norm": 0.0, "max_norm_ratio": 0.0, "max_persistence": 0.0}
    arm, yardsticks = arm_of(Attack("scaled", Adversary(kind="scaled", strength=2000.0)), **blind)
    start = arm.model.weights.copy()
    found = arm.run(3, yardsticks, 3)
    assert (found.rolled_back, found.rounds, found.suspects) == ([1, 2], 2, [["site-8"]] * 2)
    assert np.array_equal(arm.model.weights, start)
    assert set(found.after) == {"held_out", "implant", "backdoor"} and len(found.norms) == 2 * (NUM_SITES - 1)


def test_a_stale_site_is_named():
    """It sends the same update every time: nothing could be more persistent."""
    arm, yardsticks = arm_of(Attack("stale", Adversary(kind="stale")), update_norm_action="clip")
    found = arm.run(6, yardsticks, 6)
    assert found.named == [(LEAST_ROUNDS, f"site-{NUM_SITES - 1}")]
    assert found.persistence[0]["largest"] > 0.5


def test_a_careful_adversary_is_as_long_as_it_may_be_and_mixes_in_its_share():
    arm, yardsticks = arm_of(Attack("careful", Adversary(kind="implant"), hides=0.6), update_norm_action="clip")
    honest = arm.run(1, yardsticks, 1)
    random = np.random.default_rng(0)
    way, own = (random.normal(size=len(arm.model.weights)).astype(np.float32) for _ in range(2))
    arm._local = lambda *_, is_patient=True: own if not is_patient else way
    sent = arm._poisoned(Adversary(kind="implant"), 8, way, None, 3.5)
    assert np.linalg.norm(sent) == pytest.approx(3.5, rel=1e-5)
    share = (sent / 3.5 @ (way / np.linalg.norm(way)), sent / 3.5 @ (own / np.linalg.norm(own)))
    assert share == pytest.approx((0.6, 0.8), abs=0.02) and len(honest.norms) == NUM_SITES - 1
