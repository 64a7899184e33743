import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM
from flwr.supercore.task_identity import TaskIdentity

from server.federation.updates.server_optimizer import ServerState, apply_update, average, ema_decay
from shared.experiment.federation import FederationConfig

SIZE, ROUNDS = 500, 5


def flower_weights(strategy, start, deltas):
    """What Flower's own strategy makes of the same updates."""
    weights = start.copy()
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    is_adam = isinstance(strategy, FedAdam)
    for server_round, delta in enumerate(deltas, start=1):
        strategy.current_arrays = {"w": weights} if is_adam else ArrayRecord({"w": Array(weights)})
        content = RecordDict(
            {"arrays": ArrayRecord({"w": Array(weights + delta)}), "metrics": MetricRecord({"num-examples": 1})}
        )
        request = Message(RecordDict(), 1, MessageType.TRAIN)
        request.metadata.__dict__["_message_id"] = "request"
        arrays, _ = strategy.aggregate_train(server_round, [Message(content, reply_to=request)])
        weights = arrays["w"].numpy()
    return weights


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        ("fedavg", FedAvg()),
        ("fedavgm", FedAvgM(server_learning_rate=0.7, server_momentum=0.8)),
        ("fedadam", FedAdam(eta=0.05, beta_1=0.8, beta_2=0.95, tau=1e-3)),
    ],
)
def test_server_optimizers_match_flowers_strategies_on_the_same_numbers(name, strategy):
    random = np.random.default_rng(3)
    start = random.normal(size=SIZE).astype(np.float32)
    deltas = [random.normal(scale=0.1, size=SIZE).astype(np.float32) for _ in range(ROUNDS)]
    lr = {"fedavg": 1.0, "fedavgm": 0.7, "fedadam": 0.05}[name]
    config = FederationConfig(server_optimizer=name, server_lr=lr, server_momentum=0.8, server_beta_2=0.95)
    weights, state = start.copy(), ServerState()
    for delta in deltas:
        weights, state = apply_update(weights, delta.copy(), state, config)
    assert state.steps == ROUNDS
    np.testing.assert_allclose(weights, flower_weights(strategy, start, deltas), rtol=2e-5, atol=2e-6)


def test_each_optimizer_has_a_rate_of_its_own():
    assert FederationConfig().server_step == 1.0
    assert FederationConfig(server_optimizer="fedavgm", server_momentum=0.75).server_step == 0.25
    assert FederationConfig(server_optimizer="fedadam").server_step == 0.01
    assert FederationConfig(server_optimizer="fedadam", server_lr=0.3).server_step == 0.3


@pytest.mark.parametrize("name", ["fedavg", "fedavgm", "fedadam"])
def test_by_default_no_optimizer_walks_far_from_where_the_sites_were_going(name):
    """Twelve rounds of the same update with noise: at most as far again as plain averaging goes."""
    random, config = np.random.default_rng(1), FederationConfig(server_optimizer=name)
    common = random.normal(scale=1e-3, size=SIZE)
    weights, state, plain = np.zeros(SIZE, np.float32), ServerState(), np.zeros(SIZE, np.float32)
    for _ in range(12):
        delta = (common + random.normal(scale=5e-4, size=SIZE)).astype(np.float32)
        plain += delta
        weights, state = apply_update(weights, delta, state, config)
    assert 0.2 < np.linalg.norm(weights) / np.linalg.norm(plain) < 2


def test_state_taken_to_disk_and_back_gives_the_same_bits():
    config = FederationConfig(server_optimizer="fedadam", server_lr=0.1)
    deltas = np.random.default_rng(0).normal(size=(4, 50)).astype(np.float32)

    def run(is_interrupted):
        weights, state = np.zeros(50, np.float32), ServerState()
        for delta in deltas:
            weights, state = apply_update(weights, delta.copy(), state, config)
            if is_interrupted:
                weights = weights.copy()
                state = ServerState(state.steps, {name: value.copy() for name, value in state.buffers.items()})
        return weights

    assert run(True).tobytes() == run(False).tobytes()


def test_the_ema_of_a_round_is_that_of_its_steps_with_warm_up():
    assert ema_decay(0.999, 100, 10**7) == pytest.approx(0.999**100)
    assert ema_decay(0.999, 3, 3) == pytest.approx((4 / 13) ** 3)
    assert ema_decay(0.0, 3, 10**7) == 0.0
    ema, weights = np.array([1.0, 2.0], np.float32), np.array([3.0, 0.0], np.float32)
    np.testing.assert_allclose(average(ema, weights, 0.75), [1.5, 1.5])
