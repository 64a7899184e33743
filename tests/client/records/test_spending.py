"""Charges and what they come to."""

import pytest
from pydantic import ValidationError

from client.records.spending import Charge, Spending, merged, total_of
from tests.client.records.test_ledger import charge


def test_equal_rows_merge_and_empty_ones_vanish():
    rows = [Spending(1.0, 0.1, 2), Spending(2.0, 0.1, 0), Spending(1.0, 0.1, 3)]
    assert merged(rows) == [Spending(1.0, 0.1, 5)]


def test_history_in_any_order_is_the_same_history():
    rows = [Spending(2.0, 0.1, 7), Spending(1.0, 0.3, 2), Spending(1.0, 0.2, 5)]
    assert merged(rows) == merged(rows[::-1]) == [rows[2], rows[1], rows[0]]


@pytest.mark.parametrize(
    "bad", [{"sample_rate": 1.01}, {"sample_rate": -0.1}, {"steps": -1}, {"server_round": -1}], ids=str
)
def test_charge_that_would_count_for_less_than_nothing_is_refused(bad):
    with pytest.raises(ValidationError):
        charge(**bad)


def test_unit_of_a_total_is_that_of_its_first_private_charge():
    charges = [charge(mechanism="none"), charge(unit="person"), charge(unit="image")]
    assert total_of(charges, 1e-5, lambda *_: 1.0, 0).unit == "person"


def test_charges_without_dp_are_in_no_epsilon_and_make_the_total_unbounded():
    private, open_ = charge(), charge(mechanism="none")
    steps = {"charges": [private, open_, private], "delta": 1e-5, "num_uncommitted": 1}
    total = total_of(epsilon_of=lambda history, _: float(history[0].steps), **steps)
    assert (total.epsilon, total.is_unbounded, total.unit, total.num_charges) == (4.0, True, "image", 3)
    assert "unbounded (the DP part alone: epsilon 4.000 at delta 1e-05 per image)" in str(total)
    nothing: list[Charge] = []
    assert str(total_of(nothing, 1e-5, lambda *_: 1.0, 0)) == "epsilon 0.000 at delta 1e-05 per unit"
