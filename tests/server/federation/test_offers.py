"""An offer without a run asks every registered site and sends nobody weights."""

from server.federation.offer_table import newest_offers, offer_table
from server.federation.offers import OFFER_FILE
from server.federation.rounds.request import header_of
from server.federation.updates.global_model import load_global
from server.runs.run_directory import RunDir, create
from shared.messages.agreement.offer import OfferAnswer
from shared.storage.files import write_atomically
from tests.server.fake_federation import events_of, honest_sites, make_experiment, make_home, run_rounds
from tests.server.fake_grid import FakeGrid, answer_record


def ask(tmp_path, sites, **settings):
    experiment = make_experiment(**settings)
    home = make_home(tmp_path, experiment)
    model = load_global(RunDir(home / "runs" / "run").round_checkpoint(0), experiment)
    made = create(home / "runs" / "offers", experiment)
    write_atomically(made.path / OFFER_FILE, header_of(model, experiment, "offers").model_dump_json())
    run_rounds(home, FakeGrid(sites), experiment, run="offers")
    return home, newest_offers(events_of(home, "offer", run="offers"))


def test_every_registered_site_has_an_outcome_and_nobody_is_sent_weights(tmp_path):
    sites = honest_sites()
    arrays = []
    sites[100].offer = lambda content: arrays.append(dict(content.array_records["arrays"])) or None
    sites[102].is_online = False
    home, offers = ask(tmp_path, sites)
    assert [(offer["site"], offer["status"]) for offer in offers] == [
        ("site-0", "late"),
        ("site-1", "accepted"),
        ("site-2", "offline"),
    ]
    assert arrays == [{}]
    assert [site.asked for site in sites.values()] == [0, 0, 0]
    assert events_of(home, "end", run="offers")[-1]["status"] == "completed"
    assert not (home / "runs" / "offers" / "checkpoints").exists() or not any(
        (home / "runs" / "offers" / "checkpoints").iterdir()
    )


def test_the_table_says_what_a_plan_costs_and_where_a_cap_ends_it(tmp_path):
    sites = honest_sites(1)
    told = {"unit": "person", "epsilon_mean_image": 1.01, "epsilon_round": 1.25, "epsilon_run": 9.5}
    told |= {"delta": 1e-5, "epsilon_cap": 8.0}
    sites[100].offer = lambda _: answer_record(OfferAnswer(status="accepted", **told))
    _, offers = ask(tmp_path, sites, min_replies=1, rounds=4)
    rows = [list(column.cells) for column in offer_table(offers, 4).columns]
    assert [row[0] for row in rows] == ["site-0", "accepted", "person", "1.01", "1.25", "9.5", "8", rows[-1][0]]
    assert rows[-1][0] == "its cap ends the plan before round 4"


def test_the_newest_answer_of_a_site_counts():
    events = [
        {"kind": "offer", "site": "b", "status": "refused", "reason": "x"},
        {"kind": "round", "round": 1},
        {"kind": "offer", "site": "a", "status": "accepted", "reason": ""},
        {"kind": "offer", "site": "b", "status": "accepted", "reason": ""},
    ]
    assert [(offer["site"], offer["status"]) for offer in newest_offers(events)] == [
        ("a", "accepted"),
        ("b", "accepted"),
    ]
