import math

import numpy as np
import pytest

from server.federation.client_level.mechanism import central_epsilon, central_noise, read_secret
from server.federation.rounds.aggregation import FixedPointSum
from shared.errors import InputError
from shared.experiment.config import parse_experiment
from shared.experiment.sections import FederationConfig
from tests.server.fake_federation import (
    honest_sites,
    make_experiment,
    make_home,
    rounds_of,
    run_rounds,
    same,
    weights_of,
)
from tests.server.fake_grid import FakeGrid

CENTRAL = {"central_noise_multiplier": 1.0, "max_update_norm": 1.0, "update_norm_action": "clip", "sites_per_round": 3}


@pytest.mark.parametrize("noise_multiplier", [0.5, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("releases", [1, 10, 300])
def test_epsilon_is_that_of_googles_accountant(noise_multiplier, releases):
    accounting = pytest.importorskip("dp_accounting")
    from dp_accounting.pld import PLDAccountant

    event = accounting.SelfComposedDpEvent(accounting.GaussianDpEvent(noise_multiplier), releases)
    for relation in (accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,):
        accountant = PLDAccountant(relation, value_discretization_interval=1e-3)
        accountant.compose(event)
        expected = accountant.get_epsilon(1e-5)
    ours = central_epsilon(noise_multiplier, releases, 1e-5)
    assert ours == pytest.approx(expected, rel=3e-3, abs=2e-3)


def test_nothing_released_costs_nothing_and_more_rounds_cost_more():
    assert central_epsilon(1.0, 0, 1e-5) == 0
    assert central_epsilon(1.0, 1, 1e-5) < central_epsilon(1.0, 2, 1e-5) < central_epsilon(0.5, 2, 1e-5)
    assert math.isfinite(central_epsilon(0.05, 1000, 1e-5))


def test_noise_is_on_the_sum_and_the_denominator_is_fixed():
    config = FederationConfig(**CENTRAL)
    total = FixedPointSum(200_000)
    total.fold(np.full(200_000, 0.5, np.float32), "float32", 1)
    mean = total.mean(3, central_noise(b"secret", "run", 1, config))
    assert mean.mean() == pytest.approx(0.5 / 3, abs=0.005)
    assert mean.std() == pytest.approx(1 / 3, rel=0.01)


def test_noise_repeats_for_the_same_round_and_for_no_other():
    config = FederationConfig(**CENTRAL)
    draws = {
        name: central_noise(secret, run, server_round, config)(100).tobytes()
        for name, secret, run, server_round in (
            ("one", b"a", "run", 1),
            ("again", b"a", "run", 1),
            ("round", b"a", "run", 2),
            ("run", b"a", "other", 1),
            ("secret", b"b", "run", 1),
        )
    }
    assert draws["one"] == draws["again"]
    assert len(set(draws.values())) == 4
    assert central_noise(b"a", "run", 1, FederationConfig()) is None


def test_a_central_run_repeats_its_bits_and_reports_epsilon_but_no_norm_of_a_site(tmp_path):
    experiment = make_experiment(rounds=2, **CENTRAL)
    homes = [make_home(tmp_path / name, experiment) for name in ("a", "b")]
    secret = read_secret(homes[0])
    (homes[1] / "central.secret").write_text(secret.hex())
    for home in homes:
        run_rounds(home, FakeGrid(honest_sites()), experiment)
    assert same(weights_of(homes[0], 2), weights_of(homes[1], 2))
    assert (homes[0] / "central.secret").stat().st_mode & 0o777 == 0o600
    record = rounds_of(homes[0])[1]
    assert record["central_epsilon"] == central_epsilon(1.0, 2, 1e-5)
    assert record["central_unit"] == "site"
    assert not any("norm" in entry for entry in record["answered"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("max_update_norm=0.0", "needs a bound"),
        ("update_norm_action='reject'", "use clip"),
        ("weighting='examples'", "must not weigh more"),
        ("sites_per_round=0", "public number"),
    ],
)
def test_combinations_that_cannot_work_are_refused_with_the_reason(change, words):
    text = make_experiment(**CENTRAL).to_toml()
    with pytest.raises(InputError, match=words):
        parse_experiment(text, [f"federation.{change}"])


def test_counts_do_not_weigh_under_dp_sgd():
    with pytest.raises(InputError, match="weighting"):
        parse_experiment("", ["privacy.mechanism='dp-sgd'", "federation.weighting='examples'"])
