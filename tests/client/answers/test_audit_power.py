"""How many held-out units an audit needs, against a simulation of the whole mechanism."""

import numpy as np
import pytest

from client.answers.audit_counts import add_noise
from client.answers.audit_power import DETECTED_AUC, POWER, foreseen, least_units, num_cells, too_few, units_of
from client.data.dataset import open_dataset
from client.limits import AuditPolicy


def passes(audit: AuditPolicy, units: int, shift: float, rng: np.random.Generator) -> bool:
    """Whether a model passes whose members' scores lie `shift` standard deviations higher."""
    others, members = rng.standard_normal(units), rng.standard_normal(units) + shift
    cells = [np.searchsorted(audit.score_edges, scores, "right") for scores in (members, others)]
    return add_noise(cells[0], cells[1], num_cells(audit), audit.noise_multiplier).auc <= audit.max_auc


@pytest.mark.parametrize("sigma", [1.0, 6.0])
def test_the_least_number_of_units_has_the_stated_power_and_raises_few_false_alarms(sigma: float):
    edges = tuple(np.linspace(-2, 2, 9))
    audit = AuditPolicy(noise_multiplier=sigma, score_edges=edges)
    units, rng = least_units(audit), np.random.default_rng(0)
    # Two normal distributions of this distance have AUC 0.65.
    found = np.mean([not passes(audit, units, 0.5449, rng) for _ in range(400)])
    false = np.mean([not passes(audit, units, 0.0, rng) for _ in range(400)])
    assert found >= POWER - 0.03 and false <= 0.05, (units, found, false)


def test_more_noise_or_a_limit_nearer_to_the_detected_auc_needs_more_units():
    least = least_units(AuditPolicy(noise_multiplier=2.0))
    assert least_units(AuditPolicy(noise_multiplier=2.0), has_noise=False) < least
    assert least < least_units(AuditPolicy(noise_multiplier=8.0))
    assert least < least_units(AuditPolicy(noise_multiplier=2.0, max_auc=0.63))
    assert DETECTED_AUC == 0.65 and least_units(AuditPolicy(), has_noise=False) > 90


def test_the_operator_is_told_what_is_missing(make_site):
    home, _ = make_site()
    found = too_few(open_dataset(home, 16), "person", AuditPolicy())
    assert "held-out persons" in found and str(least_units(AuditPolicy())) in found


def test_units_are_persons_or_images(make_site):
    home, _ = make_site(held_out_ratio=0.0)
    data = open_dataset(home, 16)
    assert data.persons is not None
    persons = units_of(data, data.train, "person")
    assert len(persons) == 6 and sorted(np.concatenate(persons)) == sorted(data.train)
    assert all(len(set(data.persons[rows])) == 1 for rows in persons)
    assert len(units_of(data, data.train, "image")) == 24


def test_what_a_folder_foretells_of_audits_names_a_share_that_is_enough_or_says_that_none_is():
    least = least_units(AuditPolicy())
    assert foreseen(10 * least, 0.1, "person", AuditPolicy()) == ""
    assert foreseen(10 * least, 0.05, "person", AuditPolicy()).endswith("after the first round it stays")
    assert "held_out_ratio = 0.1 " in foreseen(10 * least, 0.05, "person", AuditPolicy())
    assert "will be refused" in foreseen(2 * least - 1, 0.5, "image", AuditPolicy())
    assert foreseen(2 * least, 0.5, "image", AuditPolicy()) == ""
