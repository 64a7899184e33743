"""What sites have said to an offer, as a table."""

from collections.abc import Iterable, Mapping
from typing import Any

from rich.table import Table

COLUMNS = (
    *("site", "answer", "unit", "epsilon of a mean image"),
    *("after a round", "after all rounds", "cap", "why not"),
)
FIGURES = ("epsilon_mean_image", "epsilon_round", "epsilon_run", "epsilon_cap")


def newest_offers(events: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The newest event of kind `offer` of each site, by alias."""
    newest = {str(event["site"]): dict(event) for event in events if event["kind"] == "offer"}
    return [newest[site] for site in sorted(newest)]


def offer_table(offers: Iterable[Mapping[str, Any]], rounds: int) -> Table:
    """One line for each site: accepted or not and why, and what the plan costs there at the site's own delta."""
    shown = Table(title="offers: nothing is charged for an answer", title_justify="left")
    for column in COLUMNS:
        shown.add_column(column, overflow="fold")
    for offer in offers:
        numbers = (_number(offer.get(name)) for name in FIGURES)
        shown.add_row(offer["site"], offer["status"], str(offer.get("unit") or ""), *numbers, _why(offer, rounds))
    return shown


def _why(offer: Mapping[str, Any], rounds: int) -> str:
    whole, cap = offer.get("epsilon_run"), offer.get("epsilon_cap")
    if offer["status"] == "accepted" and whole is not None and cap is not None and whole > cap:
        return f"its cap ends the plan before round {rounds}"
    return str(offer.get("reason", ""))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
