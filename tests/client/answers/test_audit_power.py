"""How many held-out units an audit needs, against a simulation of the whole mechanism."""

from types import SimpleNamespace

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


@pytest.mark.parametrize(
    ("sigma", "max_auc", "num_edges"), [(0.0, 0.6, 9), (4.0, 0.6, 9), (2.5, 0.63, 3), (1.0, 0.55, 1)]
)
def test_the_least_number_is_that_of_hanley_and_mcneil_with_the_noise_of_every_count(sigma, max_auc, num_edges):
    """Counted up one by one, from the formula as it is printed: A, Q1, Q2, and 2 J counts that move A by A / n each."""
    edges = tuple(float(edge) for edge in range(num_edges))
    audit = AuditPolicy(noise_multiplier=max(sigma, 0.5), max_auc=max_auc, score_edges=edges)
    area, counts = 0.65, 2 * (num_edges + 2)
    q_1, q_2, room = area / 1.35, 2 * area * area / 1.65, (area - max_auc) / 1.2815515655446004

    def deviation(units: int) -> float:
        rank = area * (1 - area) + (units - 1) * (q_1 - area**2) + (units - 1) * (q_2 - area**2)
        return float(np.sqrt(rank / units**2 + counts * (sigma * area / units) ** 2))

    expected = next(units for units in range(1, 10_000) if deviation(units) <= room)
    assert least_units(audit, has_noise=sigma > 0) == expected


def test_enough_units_need_no_word_and_persons_must_be_known(monkeypatch):
    audit = AuditPolicy(noise_multiplier=0.5)
    least = least_units(audit)
    rows = np.arange(2 * least)

    def data(trained: int, held_out: int, persons: object = None) -> SimpleNamespace:
        return SimpleNamespace(
            persons=persons, held_out=rows[:held_out], units=lambda _: list(rows[:trained].reshape(-1, 1))
        )

    assert too_few(data(least, least), "image", audit) == ""
    for trained, held_out in ((least - 1, least), (least, least - 1)):
        assert f"{held_out} held-out images and {trained} trained on" in too_few(
            data(trained, held_out), "image", audit
        )
    assert "not sorted by person" in too_few(data(least, least), "person", audit)
    without = least_units(audit, has_noise=False)
    assert without < least and too_few(data(without, without), "image", audit, has_noise=False) == ""


def test_rows_of_a_person_are_one_unit_wherever_they_stand():
    persons = np.array([2, 0, 2, 1, 0, 9])
    found = units_of(SimpleNamespace(persons=persons), np.array([0, 1, 2, 4, 3]), "person")
    assert [list(rows) for rows in found] == [[1, 4], [3], [0, 2]]
    assert [list(rows) for rows in units_of(SimpleNamespace(persons=None), np.array([4, 2]), "person")] == [[4], [2]]
    assert [list(rows) for rows in units_of(SimpleNamespace(persons=persons), np.array([4, 2]), "image")] == [[4], [2]]
