"""What a site gains by a federation: both models measured alike, and nothing left of the one that was trained here."""

from pathlib import Path

import numpy as np
import pytest
import torch

from client.data.dataset import open_dataset
from client.records.ledger import read_ledger
from client.training import alone
from client.training.alone import Gain, as_alone, compare_alone, held_out_draws
from shared.diffusion.losses import per_image_loss
from shared.diffusion.schedule import make_schedule
from shared.diffusion.uvit import build_model
from shared.errors import InputError
from shared.experiment.config import Experiment
from shared.seeding import Streams
from shared.storage.checkpoint import save_checkpoint
from shared.training.weights import load_weights
from tests.client.conftest import DP, SIZE, MakeSite, experiment, weights_of

CPU = torch.device("cpu")
PLAN = experiment(optim={"lr": 2e-3, "warmup_steps": 2}, federation={"local_steps": 5})


def saved(folder: Path, plan: Experiment, change: float = 0.0, **meta) -> Path:
    arrays = {name: array + np.float32(change) for name, array in weights_of(plan).items()}
    save_checkpoint(folder, {"model": arrays, "ema": arrays}, {"experiment": plan, **meta})
    return folder


@pytest.fixture
def start(tmp_path: Path) -> Path:
    return saved(tmp_path / "start", PLAN, step=7)


@pytest.fixture
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """For models that are told apart at a glance."""
    monkeypatch.setattr(alone, "LEAST_DRAWS", 64)


@pytest.mark.usefixtures("few_draws")
def test_a_ruined_model_loses_against_one_trained_here_and_nothing_is_left(make_site: MakeSite, tmp_path, start):
    home, _ = make_site(held_out_ratio=0.5)
    model = saved(tmp_path / "model", PLAN, 0.3, round=2)
    before = {path: path.read_bytes() for path in home.path.rglob("*") if path.is_file()}
    entries = len(read_ledger(home.ledger).entries)
    found = compare_alone(home, open_dataset(home, SIZE), model, start, device=CPU)
    assert found.steps == 10 and found.num_images == len(open_dataset(home, SIZE).held_out)
    assert found.alone < found.federated and "better off alone" in found.in_words()
    assert {path: path.read_bytes() for path in home.path.rglob("*") if path.is_file()} == before
    assert len(read_ledger(home.ledger).entries) == entries
    assert compare_alone(home, open_dataset(home, SIZE), model, start, device=CPU) == found


def test_the_federated_loss_is_the_products_on_held_out_images_alone(make_site: MakeSite, tmp_path, start):
    home, _ = make_site(held_out_ratio=0.5)
    data = open_dataset(home, SIZE)
    model, read = saved(tmp_path / "model", PLAN, 0.01, round=1), []
    batch = data.images.batch
    data.images.batch = lambda ids: (read.append(set(np.asarray(ids).tolist())), batch(ids))[1]
    found = compare_alone(home, data, model, start, device=CPU, steps=1)
    held_out = set(data.held_out.tolist())
    assert all(ids <= held_out or not ids & held_out for ids in read)
    network = build_model(PLAN)
    load_weights(network, {name: array + np.float32(0.01) for name, array in weights_of(PLAN).items()})
    # The draws of the command are the site's own; any others give the same mean within their error.
    draws = held_out_draws(PLAN, len(held_out), Streams(0))
    schedule = make_schedule(PLAN.diffusion.schedule, PLAN.diffusion.timesteps)
    with torch.no_grad():
        losses = [per_image_loss(network, schedule, PLAN, batch(data.held_out), *draw).mean() for draw in draws]
    assert found.federated == pytest.approx(float(torch.stack(losses).mean()), rel=0.1)


@pytest.mark.usefixtures("few_draws")
def test_frozen_tensors_stay(make_site: MakeSite, tmp_path, monkeypatch):
    made, engine = [], alone.Engine
    monkeypatch.setattr(alone, "Engine", lambda *given, **options: made.append(engine(*given, **options)) or made[-1])
    home, _ = make_site(held_out_ratio=0.5)
    plan = experiment(federation={"trainable": ["*.bias"]})
    begin, model = saved(tmp_path / "begin", plan), saved(tmp_path / "model", plan, 0.01, round=3)
    compare_alone(home, open_dataset(home, SIZE), model, begin, device=CPU, steps=4)
    (trained,) = made
    after = {name: tensor.detach().numpy() for name, tensor in trained.model.named_parameters()}
    moved = {name for name, array in weights_of(plan).items() if not np.array_equal(after[name], array)}
    assert moved and all(name.endswith("bias") for name in moved)


def test_draws_are_spread_evenly_over_the_time_steps():
    draws = held_out_draws(PLAN, 25, Streams(1))
    assert sum(len(draw.t_B) for draw in draws) >= alone.LEAST_DRAWS
    for draw in draws[:3]:
        assert sorted((draw.t_B // 2).tolist()) == list(range(25))
    assert not torch.equal(draws[0].t_B, draws[1].t_B)


def test_a_plan_with_dp_trains_alone_on_batches_of_its_size():
    assert as_alone(PLAN) == PLAN
    assert as_alone(experiment(privacy=DP, train={"batch": 9, "accumulation": 3})).train.batch == DP["expected_batch"]


@pytest.mark.parametrize(
    ("gain", "words"),
    [
        (Gain(0.20, 0.22, 0.005, 40, 9), "+0.02000 [+0.01020, +0.02980]: the federation helps"),
        (Gain(0.22, 0.20, 0.005, 40, 9), "this site is better off alone"),
        (Gain(0.20, 0.209, 0.005, 40, 9), "do not differ by more than chance"),
        (Gain(0.20, 0.30, float("inf"), 1, 9), "do not differ by more than chance"),
    ],
)
def test_what_chance_may_have_done_is_not_called_a_gain(gain, words):
    assert words in gain.in_words()


def test_what_cannot_be_compared_is_refused(make_site: MakeSite, tmp_path, start):
    home, _ = make_site(held_out_ratio=0.5)
    data, model = open_dataset(home, SIZE), saved(tmp_path / "model", PLAN, step=3)
    with pytest.raises(InputError, match="is of no federated round: give --steps"):
        compare_alone(home, data, model, start, device=CPU)
    other = saved(tmp_path / "other", experiment(model={"patch_size": 4}), round=1)
    with pytest.raises(InputError, match="another network or schedule"):
        compare_alone(home, data, other, start, device=CPU)


def test_without_held_out_images_there_is_nothing_to_compare_on(make_site: MakeSite, tmp_path, start):
    home, _ = make_site(held_out_ratio=0.0)
    with pytest.raises(InputError, match="no images are held out"):
        compare_alone(home, open_dataset(home, SIZE), start, start, device=CPU)
