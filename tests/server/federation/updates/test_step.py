"""The server's step on a small model, against the formulas."""

import numpy as np
import pytest

from server.federation.updates.aggregation import FixedPointSum
from server.federation.updates.global_model import GlobalModel, load_global, save_global
from server.federation.updates.server_optimizer import ServerState
from server.federation.updates.step import ServerStep
from shared.errors import InputError
from shared.messages.packing import Manifest, pack
from tests.server.fake_federation import make_experiment

TENSORS = {"a.weight": np.array([1.0, 2.0], np.float32), "b.weight": np.array([-3.0], np.float32)}
FROZEN = {"c.bias": np.array([7.0, 8.0], np.float32)}


def make_model(**changed):
    manifest, base = Manifest.of(TENSORS), Manifest.of(FROZEN)
    weights = pack(TENSORS, manifest)
    facts = {
        "manifest": manifest,
        "weights": weights,
        "ema": weights + np.float32(0.5),
        "base_manifest": base,
        "base": pack(FROZEN, base),
        "server_round": 4,
        "local_steps": 12,
        "optimizer": ServerState(),
        "parents": ("f" * 64,),
        "commit": None,
    }
    return GlobalModel(**{**facts, **changed})


def total_of(*updates):
    total = FixedPointSum(3)
    for weight, update in updates:
        total.fold(np.array(update, np.float32), "float32", weight)
    return total


def test_mean_moves_the_weights_and_the_average_follows(tmp_path):
    experiment, model = make_experiment(local_steps=3, min_replies=2), make_model()
    before, average = model.weights.astype(np.float64), model.ema.astype(np.float64)
    told = ServerStep(experiment, "run", tmp_path).apply(model, total_of((1, [1, 0, 2]), (3, [0, 1, -2])), "ab" * 32)
    expected = before + np.array([0.25, 0.75, -1.0])
    # 12 steps before and 3 now: decay min(d, (1 + s) / (10 + s)) to the power of 3.
    decay = min(experiment.optim.ema_decay, 16 / 25) ** 3
    assert told["weights_changed"] and told["ema_decay"] == pytest.approx(decay)
    assert told["update_norm"] == pytest.approx(np.linalg.norm([0.25, 0.75, -1.0]))
    assert model.weights == pytest.approx(expected) and model.local_steps == 15
    assert model.ema == pytest.approx(decay * average + (1 - decay) * expected)


@pytest.mark.parametrize("lr", [1.0, 0.4])
def test_a_first_step_far_longer_than_the_update_is_refused(tmp_path, lr):
    """FedAdam's unit is not the update's: at the rate of an average it walks away from the weights."""
    experiment = make_experiment(min_replies=1, server_optimizer="fedadam", server_lr=lr)
    with pytest.raises(InputError, match=rf"server_lr {lr} makes the first step of fedadam [0-9.]+ times as long"):
        ServerStep(experiment, "run", tmp_path).apply(make_model(), total_of((1, [1e-3, -1e-3, 2e-3])), "ab" * 32)


def test_only_the_first_step_is_held_against_its_update(tmp_path):
    """Momentum makes later steps longer than their updates, and an update may be nothing at all."""
    experiment = make_experiment(min_replies=1, server_optimizer="fedavgm", server_lr=1.0, server_momentum=0.99)
    step, model = ServerStep(experiment, "run", tmp_path), make_model(optimizer=ServerState())
    assert step.apply(model, total_of((1, [1, 1, 1])), "ab" * 32)["weights_changed"]
    before = model.weights.copy()
    assert step.apply(model, total_of((1, [1e-4, 0, 0])), "ab" * 32)["weights_changed"]
    assert np.linalg.norm(model.weights - before) > 1
    still = make_model(optimizer=ServerState())
    assert step.apply(still, total_of((1, [0, 0, 0])), "ab" * 32)["weights_changed"]


def test_too_few_replies_change_nothing(tmp_path):
    step, model = ServerStep(make_experiment(min_replies=3), "run", tmp_path), make_model()
    before = model.weights.copy()
    told = step.apply(model, total_of((1, [1, 1, 1]), (1, [1, 1, 1])), "ab" * 32)
    assert not told["weights_changed"] and "2 usable replies" in told["reason"]
    assert (model.weights == before).all() and model.local_steps == 12 and model.optimizer.steps == 0


def test_everything_between_rounds_comes_back_from_disk(tmp_path):
    buffers = {"momentum": np.array([0.1, 0.2, 0.3], np.float32)}
    experiment = make_experiment(server_optimizer="fedavgm", trainable=("*.weight",))
    model = make_model(optimizer=ServerState(5, buffers), record={"round": 4})
    save_global(tmp_path / "round-000004", model, experiment)
    found = load_global(tmp_path / "round-000004", experiment)
    for name in ("weights", "ema", "base"):
        assert (getattr(found, name) == getattr(model, name)).all(), name
    assert (found.manifest, found.base_manifest) == (model.manifest, model.base_manifest)
    assert (found.server_round, found.local_steps, found.parents, found.record) == (4, 12, ("f" * 64,), {"round": 4})
    assert found.optimizer.steps == 5 and (found.optimizer.buffers["momentum"] == buffers["momentum"]).all()
