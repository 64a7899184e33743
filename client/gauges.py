"""What a site exposes to its own Prometheus, on loopback: counts of its journal and what it has spent."""

from collections import Counter
from collections.abc import Iterator

from client.chain import read_chain
from client.settings import Home, SiteConfig

Gauge = tuple[str, str, str, dict[str, str], float]
"""Name, kind, help, labels, value."""


def site_gauges(home: Home, settings: SiteConfig) -> Iterator[Gauge]:
    """Journal entries by kind, bytes released, epsilon after the newest release, the cap."""
    entries = read_chain(home.journal)
    site = {"site": settings.alias}
    for kind, number in sorted(Counter(entry.kind for entry in entries).items()):
        yield "maskfed_site_journal_total", "counter", "Journal entries by kind.", {**site, "kind": kind}, number
    releases = [entry.fields for entry in entries if entry.kind == "release"]
    sent = sum(int(fields.get("bytes", 0)) for fields in releases)
    yield "maskfed_site_released_bytes_total", "counter", "Bytes of all releases.", site, sent
    if releases:
        newest = releases[-1]
        spent = float("inf") if newest.get("is_unbounded") else float(newest.get("epsilon", 0.0))
        yield "maskfed_site_epsilon", "gauge", "Spent so far; infinite after a release without DP.", site, spent
    yield (
        "maskfed_site_epsilon_cap",
        "gauge",
        "Largest total epsilon that the policy allows.",
        site,
        (settings.policy.epsilon_cap),
    )
