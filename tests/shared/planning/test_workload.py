"""Figures of a plan follow from its constants, each by its own formula."""

import math

import pytest

from shared.experiment.config import parse_experiment
from shared.planning import speed_probe
from shared.planning.speed_probe import images_per_second, num_values
from shared.planning.workload import COHERENCE, DP_SLOWDOWN, duration, lines, run_bytes, workload

PLAN = """
[model]
image_size = 16
patch_size = 8
[federation]
rounds = 3
local_steps = 5
wire_dtype = "bfloat16"
[privacy]
mechanism = "dp-sgd"
noise_multiplier = 2.0
sample_rate = 0.1
draws = 4
"""


def test_signal_bytes_and_time_of_a_private_round():
    plan = parse_experiment(PLAN)
    work = workload(plan, num_sites=4, units=300, sizes=(2000, 900), rate=10.0)
    assert work.units_per_step == pytest.approx(30)
    assert work.signal_to_noise == pytest.approx(COHERENCE * 30 * 2 / (2.0 * 30))
    assert work.megabytes_per_round == pytest.approx(2 * 900 * 2 / 1e6)
    assert work.images_per_round == pytest.approx(5 * 30 * 4)
    assert work.seconds_per_round == pytest.approx(5 * 30 * 4 / 10 * DP_SLOWDOWN)
    assert any("averaged over 4 sites" in line for line in lines(plan, work, 4))


def test_a_plan_without_dp_has_no_noise():
    plan = parse_experiment(PLAN, ["privacy.mechanism='none'", "train.batch=7"])
    work = workload(plan, num_sites=4, units=300, sizes=(2000, 900), rate=10.0)
    assert work.signal_to_noise is None
    assert work.images_per_round == 35
    assert work.seconds_per_round == pytest.approx(3.5)


@pytest.mark.parametrize(
    ("overrides", "sent", "both"),
    [
        (["federation.wire_dtype='float32'"], 4 * 900, 8 * 900),
        (["federation.wire_dtype='int8'"], 900 + 4 * 4, 900 + 16 + 2 * 900),
        (["federation.secure=true", "federation.secure_bits=64"], 8 * 900, 10 * 900),
    ],
)
def test_bytes_are_those_of_the_wire(overrides, sent, both):
    plan = parse_experiment(PLAN, ["privacy.mechanism='none'", *overrides])
    work = workload(plan, num_sites=4, units=300, sizes=(2000, 900), rate=10.0)
    assert work.megabytes_sent == pytest.approx(sent / 1e6) and work.megabytes_per_round == pytest.approx(both / 1e6)
    assert any("MB for each site and round (0.0 of it sent)" in line for line in lines(plan, work, 4))


def test_sizes_are_counted_without_allocating_them():
    plan = parse_experiment(PLAN)
    whole, trained = num_values(plan)
    assert whole == trained
    attention = num_values(parse_experiment(PLAN, ["federation.trainable=['attention']"]))
    assert attention[0] == whole
    assert 0 < attention[1] < whole
    large = num_values(parse_experiment("[model]\nsize = 'L'\nimage_size = 64\n"))
    assert large[0] == pytest.approx(231e6, rel=0.01)


def test_the_probe_ends_in_its_time_and_does_at_least_one_step(monkeypatch):
    times = iter([0.0, 0.4, 0.9, 1.3, 2.0])
    monkeypatch.setattr(speed_probe.time, "perf_counter", lambda: next(times))
    assert images_per_second(parse_experiment(PLAN), 1.0) == pytest.approx(3 * speed_probe.PROBE_BATCH / 2.0)


@pytest.mark.parametrize(
    ("seconds", "text"), [(59, "59 seconds"), (600, "10 minutes"), (7200, "2 hours"), (28.5e6, "330 days")]
)
def test_a_length_of_time_has_the_unit_that_suits_it(seconds, text):
    assert duration(seconds) == text
    assert math.isfinite(seconds)


@pytest.mark.parametrize(
    ("changes", "copies"),
    [
        ((), 4 * 2),  # at most rounds + 1 checkpoints, one being written
        (("train.keep_last=1",), 2 * 2),
        (("train.keep_last=1", "train.keep_every=2", "federation.server_optimizer=fedadam"), 3 * 4),
        (("train.keep_last=9", "federation.server_optimizer=fedavgm"), 5 * 3),
    ],
)
def test_disk_of_a_run_is_that_of_the_checkpoints_it_keeps(changes, copies):
    assert run_bytes(parse_experiment(PLAN, list(changes)), 7) == copies * 7
