"""Epsilon of a history, without the cost of Opacus until a history with DP steps asks for it."""

from client.records.spending import Spending


def epsilon_of(history: list[Spending], delta: float) -> float:
    """`accounting.epsilon`, imported when first needed: only a DP history costs the import of Opacus."""
    from client.privacy.accounting import epsilon

    return epsilon(history, delta)
