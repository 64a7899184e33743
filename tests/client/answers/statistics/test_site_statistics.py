"""Feature statistics: what is charged, what leaves, what is refused."""

import numpy as np
import pytest
import torch

from client.answers.statistics.site_statistics import StatisticsPlan, release_statistics
from client.data.dataset import open_dataset
from client.policy.refusals import RefusedError
from client.privacy.epsilon import epsilon_of
from client.records.journal import Journal
from client.records.ledger import read_ledger
from shared.data.synthetic import generate, write_folder
from shared.errors import InputError
from shared.evaluation.feature_statistics import FeatureSpace, statistics_of
from shared.evaluation.frechet import frechet_distance
from shared.evaluation.networks import load_extractor
from shared.evaluation.private_statistics import make_projection, repaired

ALLOWED = {"tasks": ("statistics",), "min_images_statistics": 2, "min_noise_multiplier": 0.5}


@pytest.fixture(scope="module")
def extractor():
    return load_extractor("random-inception")


@pytest.fixture(scope="module")
def projection(extractor):
    public = torch.from_numpy(generate(80, 16, 0)[0])
    return make_projection(extractor(public), extractor.space, 6)


def release(site, extractor, plan):
    return release_statistics(*site, plan, lambda: extractor, epsilon_of)


def charges(site):
    return [charge for _, charge in read_ledger(site[0].ledger).charges]


def test_exact_statistics_are_those_of_the_training_images_and_make_the_total_unbounded(make_site, extractor):
    site = make_site(**ALLOWED)
    found = release(site, extractor, StatisticsPlan("exact", extractor.space))
    data = open_dataset(site[0], 16)
    expected = statistics_of(extractor(data.images.batch(data.train)), extractor.space)
    np.testing.assert_allclose(found.outer_DD, expected.outer_DD, rtol=1e-6)
    assert (found.n, found.release, found.site) == (len(data.train), "exact", "site0")
    (charge,) = charges(site)
    assert (charge.task, charge.mechanism) == ("statistics", "none")
    assert read_ledger(site[0].ledger).total(data.dataset_id, 1e-5, epsilon_of).is_unbounded
    assert Journal(site[0].journal).entries()[-1].fields["release"] == "exact"


def test_private_statistics_are_one_charged_gaussian_step(make_site, extractor, projection):
    site = make_site(**ALLOWED)
    found = release(site, extractor, StatisticsPlan("dp", extractor.space, projection, 1.5))
    (charge,) = charges(site)
    assert (charge.mechanism, charge.noise_multiplier, charge.sample_rate, charge.steps) == ("gaussian", 1.5, 1.0, 1)
    total = read_ledger(site[0].ledger).total(open_dataset(site[0], 16).dataset_id, 1e-5, epsilon_of)
    assert found.epsilon == pytest.approx(total.epsilon) and not total.is_unbounded and 2 < total.epsilon < 4
    assert found.release == "dp" and found.n != round(found.n) and found.space == projection.projected_space


def test_noise_is_new_every_time(make_site, extractor, projection):
    site = make_site(**ALLOWED)
    plan = StatisticsPlan("dp", extractor.space, projection, 3.0)
    one, other = release(site, extractor, plan), release(site, extractor, plan)
    assert (one.total_D != other.total_D).all() and len(charges(site)) == 2


def test_private_statistics_of_many_images_are_near_the_exact_ones(make_site, extractor, projection, tmp_path):
    write_folder(tmp_path / "many", 240, 16, 4, site="site1")
    site = make_site(tmp_path / "many", **{**ALLOWED, "min_noise_multiplier": 0.2, "epsilon_cap": 100.0})
    noisy = release(site, extractor, StatisticsPlan("dp", extractor.space, projection, 0.24))
    data = open_dataset(site[0], 16)
    exact = projection.statistics(extractor(data.images.batch(data.train)))
    far = projection.statistics(extractor(torch.zeros(50, 3, 16, 16, dtype=torch.uint8)) + 0.1)
    assert frechet_distance(far, repaired(noisy)) == pytest.approx(frechet_distance(far, exact), rel=0.15)


def test_charge_is_on_disk_before_the_first_feature(make_site, extractor):
    site = make_site(**ALLOWED)

    def fail():
        assert len(charges(site)) == 1
        raise OSError("network file gone")

    with pytest.raises(OSError, match="gone"):
        release_statistics(*site, StatisticsPlan("exact", extractor.space), fail, epsilon_of)
    history = read_ledger(site[0].ledger)
    assert len(history.charges) == 1 and not history.committed


def test_cap_holds_for_statistics_too(make_site, extractor, projection):
    site = make_site(**{**ALLOWED, "epsilon_cap": 1.0})
    with pytest.raises(RefusedError, match="the cap is 1"):
        release(site, extractor, StatisticsPlan("dp", extractor.space, projection, 0.6))
    assert charges(site) == []


@pytest.mark.parametrize(
    ("policy", "kind", "reason"),
    [
        ({"tasks": ("train",)}, "exact", "does not list `statistics`"),
        ({"require_dp": True}, "exact", "require_dp"),
        ({"secure": {"require": True}}, "exact", r"policy\.secure\.require"),
        ({"min_noise_multiplier": 2.0}, "dp", "min_noise_multiplier 2"),
        ({"unit": "person"}, "dp", "protect images"),
    ],
)
def test_policy_refuses_and_nothing_is_charged(make_site, extractor, projection, policy, kind, reason):
    site = make_site(**{**ALLOWED, **policy})
    with pytest.raises(InputError, match=reason):
        release(site, extractor, StatisticsPlan(kind, extractor.space, projection if kind == "dp" else None, 1.0))
    assert charges(site) == []


def test_exact_statistics_after_dp_are_refused(make_site, extractor, projection):
    site = make_site(**ALLOWED)
    release(site, extractor, StatisticsPlan("dp", extractor.space, projection, 2.0))
    with pytest.raises(RefusedError) as refused:
        release(site, extractor, StatisticsPlan("exact", extractor.space))
    assert (refused.value.code, "after DP rounds" in refused.value.note) == ("policy", True)


def test_too_few_images_are_the_operators_to_know(make_site, extractor):
    site = make_site(**{**ALLOWED, "min_images_statistics": 1000})
    with pytest.raises(RefusedError) as refused:
        release(site, extractor, StatisticsPlan("exact", extractor.space))
    assert refused.value.code == "policy" and "1000" in refused.value.note and "1000" not in refused.value.reason
    assert charges(site) == []


def test_another_extractor_than_asked_for_is_refused(make_site, extractor):
    site = make_site(**ALLOWED)
    with pytest.raises(InputError, match="do not compare"):
        release(site, extractor, StatisticsPlan("exact", FeatureSpace("other", "", "00")))
