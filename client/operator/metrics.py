"""What a site exposes to its own Prometheus, on loopback: counts of its journal and what it has spent."""

import functools
from collections import Counter
from collections.abc import Iterator

from client.data.dataset import current_id
from client.home import Home
from client.privacy.epsilon import epsilon_of
from client.records.chain import read_chain
from client.records.ledger import read_ledger
from client.records.spending import Spending
from client.settings import SiteConfig

Gauge = tuple[str, str, str, dict[str, str], float]
"""Name, kind, help, labels, value."""


def site_gauges(home: Home, settings: SiteConfig) -> Iterator[Gauge]:
    """Journal entries by kind, bytes released, what the ledger says of the data set in use, the cap."""
    entries = read_chain(home.journal)
    site = {"site": settings.alias}
    for kind, number in sorted(Counter(entry.kind for entry in entries).items()):
        yield "maskfed_site_journal_total", "counter", "Journal entries by kind.", {**site, "kind": kind}, number
    sent = sum(int(entry.fields.get("bytes", 0)) for entry in entries if entry.kind == "release")
    yield "maskfed_site_released_bytes_total", "counter", "Bytes of all releases.", site, sent
    yield from _spending(home, settings)
    cap = settings.policy.epsilon_cap
    yield "maskfed_site_epsilon_cap", "gauge", "Largest total epsilon that the policy allows.", site, cap


def _spending(home: Home, settings: SiteConfig) -> Iterator[Gauge]:
    dataset_id = current_id(home)
    if dataset_id is None:
        return
    total = read_ledger(home.ledger).total(dataset_id, settings.policy.delta, _epsilon_of)
    site = {"site": settings.alias, "unit": total.unit or settings.policy.unit}
    whole = float("inf") if total.is_unbounded else total.epsilon
    yield "maskfed_site_epsilon", "gauge", "Spent so far; infinite after a release without DP.", site, whole
    yield "maskfed_site_dp_epsilon", "gauge", "Spent so far by releases with DP alone.", site, total.epsilon
    text = "Charges that were reserved and never completed; they count as spent."
    yield "maskfed_site_uncommitted_charges", "gauge", text, site, total.num_uncommitted


def _epsilon_of(history: list[Spending], delta: float) -> float:
    """The accountant, asked once per history: a scrape comes every few seconds."""
    return _remembered(tuple(history), delta)


@functools.lru_cache(maxsize=4)
def _remembered(history: tuple[Spending, ...], delta: float) -> float:
    return epsilon_of(list(history), delta)
