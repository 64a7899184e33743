import sys
from pathlib import Path

import pytest

from client.data.dataset import open_dataset
from client.operator.status import status_facts, summary
from client.policy.budget import reserve
from client.records.ledger import open_ledger
from client.records.spending import Charge
from shared.storage import room
from tests.client.conftest import SIZE, MakeSite


def test_a_full_disk_is_told_before_everything_else(make_site: MakeSite, monkeypatch: pytest.MonkeyPatch):
    home, settings = make_site()
    usual = list(summary(home, settings))
    assert usual[0].startswith("data set ")
    monkeypatch.setattr(room, "has_room", lambda *_: False)
    first, *others = summary(home, settings)
    assert first.startswith(f"DISK: the disk of {home.path} is full")
    assert others == usual


def charge(home, server_round):
    fields = {"task": "train", "run": "first", "request_digest": "x", "plan_digest": "p"}
    noise = {"mechanism": "dp-sgd", "noise_multiplier": 1.0, "sample_rate": 0.2, "steps": 2, "unit": "image"}
    data = open_dataset(home, SIZE)
    made = {"dataset_id": data.dataset_id, "fingerprint": data.fingerprint}
    return Charge(server_round=server_round, **made, **fields, **noise)


def test_the_total_of_the_newest_charge_is_told_without_the_accountant(make_site: MakeSite, monkeypatch):
    home, settings = make_site()
    with open_ledger(home.ledger, Path(settings.head_file)) as ledger:
        ledger.commit(reserve(ledger, charge(home, 1), settings.policy, lambda *_: 3.25, home))
    monkeypatch.setitem(sys.modules, "client.privacy.epsilon", None)  # an import of it would fail
    spent = status_facts(home, settings)["spent"]
    assert (spent.epsilon, spent.unit, spent.num_charges, spent.num_uncommitted) == (3.25, "image", 1, 0)


@pytest.mark.parametrize("change", ["later charge", "other delta", "damaged"])
def test_a_total_that_no_longer_holds_is_computed_again(change, make_site: MakeSite, monkeypatch):
    import client.privacy.epsilon

    home, settings = make_site()
    monkeypatch.setattr(client.privacy.epsilon, "epsilon_of", lambda *_: 7.5)
    with open_ledger(home.ledger, Path(settings.head_file)) as ledger:
        ledger.commit(reserve(ledger, charge(home, 1), settings.policy, lambda *_: 3.25, home))
        if change == "later charge":
            ledger.reserve(charge(home, 2), cap=10.0, delta=1e-5, epsilon_of=lambda *_: 1.0)
    if change == "other delta":
        policy = settings.policy.model_copy(update={"delta": 1e-6})
        settings = settings.model_copy(update={"policy": policy})
    if change == "damaged":
        home.spent.write_text("{")
    assert status_facts(home, settings)["spent"].epsilon == 7.5
