import json

from client.operator.alerts import SiteAlerts
from client.records.journal import Journal
from client.records.spending import KeptTotal


def kept(home, epsilon):
    home.spent.write_text(
        KeptTotal(
            sequence=3,
            dataset_id="d",
            epsilon=epsilon,
            is_unbounded=False,
            delta=1e-5,
            unit="person",
            epsilon_next=None,
        ).model_dump_json()
    )


def test_refusals_are_told_once_for_each_run_and_code(make_site):
    home = make_site(epsilon_cap=8.37)[0]
    journal, alerts = Journal(home.journal), SiteAlerts(home)
    before = len(alerts(0.0))
    for digest, run, code in (("1", "a", "budget"), ("2", "a", "budget"), ("3", "b", "clock")):
        journal.write("request", request_digest=digest, run=run, task="train", server_round=1)
        journal.write("refusal", request_digest=digest, code=code, reason="epsilon 7.77 is above the cap 8.37")
    found = alerts(0.0)[before:]
    assert [text for _, _, text in found] == [
        "a request of run a was refused (budget): `maskfed-client journal show` says why",
        "a request of run b was refused (clock): `maskfed-client journal show` says why",
    ]
    assert SiteAlerts(home)(4e9) == []


def test_eighty_percent_of_the_cap_are_told_without_a_number_of_the_site(make_site):
    home = make_site(epsilon_cap=8.37)[0]
    alerts = SiteAlerts(home)
    assert alerts(4e9) == []
    kept(home, 6.69)
    assert alerts(4e9) == []
    kept(home, 6.71)
    (kind, _, text), *others = alerts(4e9)
    assert (kind, others) == ("cap", []) and text.startswith("80% of the epsilon cap") and "6.7" not in text
    assert "8.37" not in text


def test_a_damaged_journal_is_told_and_hides_nothing_else(make_site):
    home = make_site(epsilon_cap=8.0)[0]
    Journal(home.journal).write("request", request_digest="1", run="a", task="train", server_round=1)
    alerts = SiteAlerts(home)
    alerts(0.0)
    with home.journal.open("a") as file:
        file.write(json.dumps({"no": "entry"}) + "\n")
    kept(home, 7.9)
    assert [kind for kind, _, _ in alerts(0.0)] == ["records", "cap"]
