"""What a site's own Prometheus sees is what the ledger says."""

from pathlib import Path

import pytest

from client.data.dataset import current_id, open_dataset
from client.home import Home
from client.operator import metrics
from client.operator.metrics import site_gauges
from client.records.chain import read_chain
from client.records.ledger import open_ledger
from client.records.spending import Charge, Spending
from client.settings import SiteConfig
from tests.client.conftest import MakeSite


def spend(site: tuple[Home, SiteConfig], mechanism: str, *, commit: bool = True) -> None:
    home, settings = site
    charge = Charge(
        dataset_id=str(current_id(home)),
        fingerprint=open_dataset(home, settings.image_size).fingerprint,
        task="statistics",
        run="ask",
        server_round=0,
        request_digest="r",
        plan_digest="p",
        mechanism=mechanism,
        noise_multiplier=2.0,
        sample_rate=1.0,
        steps=1,
    )

    with open_ledger(home.ledger, Path(settings.head_file)) as ledger:
        entry, _ = ledger.reserve(charge, cap=10, delta=1e-5, epsilon_of=epsilon_of)
        if commit:
            ledger.commit(entry)


def epsilon_of(history: list[Spending], _: float) -> float:
    return sum(row.steps / row.noise_multiplier for row in history)


def values(site: tuple[Home, SiteConfig]) -> dict[str, float]:
    return {name.removeprefix("maskfed_site_"): value for name, _, _, labels, value in site_gauges(*site)
            if "kind" not in labels}  # fmt: skip


def test_spending_is_the_ledgers_whatever_was_released(make_site: MakeSite, monkeypatch: pytest.MonkeyPatch):
    asked: list[list[Spending]] = []
    monkeypatch.setattr(
        metrics, "epsilon_of", lambda history, delta: (asked.append(history), epsilon_of(history, delta))[1]
    )
    metrics._remembered.cache_clear()
    site = make_site()
    assert values(site) == {
        "released_bytes_total": 0,
        "epsilon": 0.0,
        "dp_epsilon": 0.0,
        "uncommitted_charges": 0,
        "epsilon_cap": 10.0,
    }
    # Private statistics leave no epsilon in the journal.
    spend(site, "gaussian")
    assert values(site)["epsilon"] == values(site)["dp_epsilon"] == 0.5
    assert len(asked) == 1, "one history is accounted once"
    spend(site, "gaussian", commit=False)
    assert (values(site)["epsilon"], values(site)["uncommitted_charges"]) == (1.0, 1)
    spend(site, "none")
    assert (values(site)["epsilon"], values(site)["dp_epsilon"]) == (float("inf"), 1.0)


def test_spending_names_its_unit(make_site: MakeSite):
    site = make_site(unit="person")
    units = {name: labels["unit"] for name, _, _, labels, _ in site_gauges(*site) if "unit" in labels}
    assert units["maskfed_site_epsilon"] == "person"


def test_site_without_images_has_its_journal_and_cap(make_site: MakeSite):
    home, settings = make_site()
    (home.datasets / "current").unlink()
    home.journal.unlink(missing_ok=True)
    assert read_chain(home.journal) == []
    assert set(values((home, settings))) == {"released_bytes_total", "epsilon_cap"}
