"""Figure 2: shapes, distance, equal operations, and what the command writes."""

import math

import pytest
import torch
from matplotlib.figure import Figure

from server.studies import toy_network, toys
from server.studies.stored_results import FOLDER as RESULTS
from server.studies.stored_toys import read_toys
from server.studies.toy_network import draw_samples, new_model, train
from server.studies.toy_shapes import energy_distance, rose, swiss_roll, without_dependence
from server.studies.toys import VISIBLE, run_toy
from shared.diffusion.schedule import make_schedule
from shared.seeding import generator


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(toy_network, "SAMPLING_STEPS", 5)
    monkeypatch.setattr(toy_network, "BATCH_POINTS", 64)


@pytest.mark.parametrize("name", ["swiss-roll", "rose"])
def test_both_ways_cost_the_same_and_everything_is_written(name, tmp_path):
    result = run_toy(name, tmp_path, seeds=(1, 2), budgets=(4, 12), num_samples=50)
    assert [run.seed for run in result.runs] == [1, 2]
    coordinates = {"swiss-roll": 2, "rose": 3}[name]
    for run in result.runs:
        for point in run.points:
            shown = point.masked_steps * VISIBLE[name] + point.denoising_steps * coordinates
            assert shown == point.operations * coordinates
            assert point.masked_steps > 0 and point.denoising_steps > 0
    assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert read_toys(tmp_path) == [result]
    assert result.command == f"maskfed-server toy {name} --seed=1 --seed=2 --operations=4 --operations=12"
    assert result.threads > 0 and result.hardware and len(result.date) == 10
    first, second = (run.points[1].scratch for run in result.runs)
    assert result.median("scratch", 1) == (first + second) / 2


def test_a_toy_repeats_with_its_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(toys, "_plot", lambda *_: None)
    tiny = {"budgets": (4,), "num_samples": 50}
    first, again, other = (run_toy("swiss-roll", tmp_path, seeds=(seed,), **tiny).runs[0] for seed in (1, 1, 2))
    assert first == again
    assert first.points[0].two_stages != other.points[0].two_stages


def test_lengths_stand_under_the_curves_each_once():
    axes, (result,) = Figure().add_subplot(), read_toys(RESULTS / "toys")[-1:]
    toys._curves(axes, result)
    axes.figure.canvas.draw()
    ticks = [tick.get_text() for which in ("major", "minor") for tick in axes.get_xticklabels(which=which)]
    assert [int(text.replace(",", "")) for text in ticks] == [point.operations for point in result.runs[0].points]


@pytest.mark.parametrize("shape", [swiss_roll, rose])
def test_points_fill_the_range_that_the_noise_is_made_for(shape):
    points = shape(20_000, generator(0))
    assert points.abs().max() < 1.05
    assert (points.std(0) > 0.2).all()


def test_swiss_roll_is_a_spiral():
    points = swiss_roll(5000, generator(0)) * 4.8 * torch.pi
    radius, angle = points.norm(dim=1), torch.atan2(points[:, 1], points[:, 0])
    turns = (radius - angle) / (2 * torch.pi)
    assert (turns - turns.round()).abs().quantile(0.99) < 0.1


def test_energy_distance_is_its_double_sum():
    x, y = torch.randn(7, 3, generator=generator(0)), torch.randn(5, 3, generator=generator(1)) + 0.5
    between = [math.dist(a, b) for a in x for b in y]
    within = [[math.dist(a, b) for i, a in enumerate(each) for b in each[:i]] for each in (x, y)]
    first, second = (sum(each) / len(each) for each in within)
    assert energy_distance(x, y) == pytest.approx(2 * sum(between) / len(between) - first - second, rel=1e-4)


def test_energy_distance_sees_dependence_that_marginals_do_not_show():
    points, fresh = (swiss_roll(4000, generator(seed)) for seed in (0, 100))
    shuffled = without_dependence(points, generator(50))
    assert torch.equal(shuffled.sort(0).values, points.sort(0).values)
    assert energy_distance(shuffled, fresh) > 5 * abs(energy_distance(points, fresh))


def test_nothing_makes_a_network_before_training_treat_coordinates_as_independent():
    model, t, ids = new_model(2, 0), torch.tensor([500]), torch.tensor([[0, 1]])
    first = model(torch.tensor([[[0.3], [0.5]]]), t, ids)
    other = model(torch.tensor([[[0.3], [-0.9]]]), t, ids)
    assert first[0, 0] != other[0, 0]


def test_training_on_everything_brings_samples_nearer_to_the_data(monkeypatch):
    monkeypatch.setattr(toy_network, "BATCH_POINTS", 256)
    monkeypatch.setattr(toy_network, "SAMPLING_STEPS", 20)
    schedule, fresh, distances = make_schedule("linear", 1000), swiss_roll(500, generator(9)), []
    for steps in (1, 60):
        model = new_model(2, 0)
        train(model, schedule, "swiss-roll", 2, steps, 0)
        distances.append(energy_distance(draw_samples(model, schedule, 500, 0), fresh))
    assert 0 < distances[1] < distances[0] / 3


def test_the_figure_shows_the_named_budget_where_it_is_there(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(toys, "_plot", lambda clouds, *_: shown.append(list(clouds)))
    monkeypatch.setattr(toys, "SHOWN_BUDGET", 6)
    run_toy("swiss-roll", tmp_path, seeds=(0, 1), budgets=(4, 6), num_samples=20)
    assert shown == [["data", "marginal proxy", "both stages", "from scratch"]]
