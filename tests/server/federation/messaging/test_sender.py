"""A registered site speaks in the names of others: rounds, audits and statistics count only who was asked."""

import threading

import pytest
from flwr.app import ConfigRecord, Error, Message, MessageType, RecordDict

from server.federation.fleet.registry import Registry
from server.federation.messaging.question import collect
from server.federation.messaging.sender import SHOWN_FORGERIES, Forgeries, forgery
from shared.messages.training import TrainRequest
from shared.storage.runlog import RunLog, read_metrics
from tests.server.fake_federation import (
    FAST,
    honest_sites,
    make_experiment,
    make_home,
    reply,
    rounds_of,
    run_rounds,
    same,
    trained,
    weights_of,
)
from tests.server.fake_grid import FakeGrid, Site
from tests.signing import public_of

EVIL = 102


def message(content, *, source, reply_to=""):
    """A message as it may come out of a pull: Flower compares neither field with the key that pushed it."""
    is_error = isinstance(content, Error)
    made = Message(RecordDict() if is_error else content, 1, MessageType.TRAIN, group_id="1")
    if is_error:
        made.__dict__.update(_content=None, _error=content)
    made.metadata.__dict__.update(_src_node_id=source, _reply_to_message_id=reply_to)
    return made


class ForgingGrid(FakeGrid):
    """Every pull also returns what `forge(question_id)` makes, before the honest replies."""

    forge = staticmethod(lambda _question_id: [])

    def pull_messages(self, message_ids):
        (question_id,) = message_ids
        return [*self.forge(question_id), *super().pull_messages(message_ids)]


def attack(home, experiment, make):
    """A round in which the evil site-2 forges what `make(content, question_id)` says once it has read its question."""
    read = threading.Event()
    held = {}

    def evil(content, _asked):
        held["content"] = content
        read.set()
        return trained("site-2", content)

    grid = ForgingGrid(honest_sites(site_2=evil))
    for node in (100, 101):
        grid.sites[node].delay_seconds = 0.3
    grid.forge = lambda question_id: make(held["content"], question_id) if read.is_set() else []
    run_rounds(home, grid, experiment)
    return rounds_of(home)


def poison(content):
    request = TrainRequest.from_record(content)
    return reply(request, request.weights * 0 + 1)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The home after a round in which nobody forges anything."""
    experiment = make_experiment(rounds=1)
    home = make_home(tmp_path_factory.mktemp("quiet"), experiment)
    run_rounds(home, FakeGrid(honest_sites()), experiment)
    return home


@pytest.mark.parametrize(
    "make",
    [
        lambda content, _: [message(poison(content), source=1)],
        lambda content, _: [message(poison(content), source=100)],
        lambda content, _: [message(poison(content), source=EVIL)],
        lambda content, _: [message(poison(content), source=1, reply_to="message-999")],
        lambda content, question_id: [message(poison(content), source=999, reply_to=question_id)],
        lambda content, _: [message(Error(8, "gone"), source=1)],
        lambda content, question_id: [message(Error(8, "gone"), source=999, reply_to=question_id)],
        lambda content, _: [message(RecordDict(), source=1)] * 3,
    ],
)
def test_a_forged_reply_is_counted_and_dropped_and_the_honest_one_counts(tmp_path, make, undisturbed):
    experiment = make_experiment(rounds=1)
    attacked = make_home(tmp_path, experiment)
    (record,) = attack(attacked, experiment, make)
    assert [entry["site"] for entry in record["answered"]] == ["site-0", "site-1", "site-2"]
    assert record["forged"]["count"] >= 1
    assert {entry["site"] for entry in record["forged"]["first"]} <= {"site-0", "site-1", "site-2"}
    assert same(weights_of(attacked, 1), weights_of(undisturbed, 1))


def test_an_honest_round_has_no_word_of_forgery(undisturbed):
    assert "forged" not in rounds_of(undisturbed)[0]


@pytest.mark.parametrize("kind", ["audit", "statistics"])
def test_a_question_takes_no_answer_in_the_name_of_another_site(tmp_path, kind):
    registry = Registry(tmp_path / "sites.json")
    for index in range(2):
        registry.add(f"site-{index}", f"ecdsa-sha2-nistp384 key{index}", public_of(f"site-{index}"))
        registry.set_node_id(f"site-{index}", 100 + index)

    def says(text):
        return RecordDict({"header": ConfigRecord({"json": text})})

    grid = ForgingGrid({100 + index: Site(lambda *_: says("honest"), delay_seconds=0.2) for index in range(2)})
    grid.forge = lambda _: [message(says("passed"), source=1)]
    taken = {}

    def take(got, alias):
        taken[alias] = got.content["header"]["json"]
        return "taken", ""

    log = RunLog(tmp_path / "metrics.jsonl")
    collect(grid, tmp_path, says("?"), MessageType.QUERY, take, log, kind, timing=FAST, deadline_seconds=20)
    assert taken == {"site-0": "honest", "site-1": "honest"}
    end = read_metrics(log.path)[-1]
    assert end["kind"] == "end"
    assert end["forged"]["count"] >= 2


def test_the_superlinks_own_errors_about_a_question_are_believed():
    assert not forgery(message(Error(5, "node unavailable"), source=1, reply_to="q"), "q", 100)
    assert forgery(message(RecordDict(), source=1, reply_to="q"), "q", 100)
    assert not forgery(message(RecordDict(), source=100, reply_to="q"), "q", 100)


def test_what_a_forger_writes_is_one_plain_line_and_a_flood_is_counted_not_kept():
    text = forgery(message(RecordDict(), source=1, reply_to="\x1b[2J\n" + "x" * 10_000), "q", 100)
    assert text.isprintable()
    assert len(text) < 200
    forgeries = Forgeries()
    for number in range(1000):
        forgeries.add(f"site-{number}", text)
    found = forgeries.take()["forged"]
    assert (found["count"], len(found["first"])) == (1000, SHOWN_FORGERIES)
    assert forgeries.take() == {}
