import threading
import time
from dataclasses import replace

import pytest
from flwr.app import ConfigRecord, MessageType, RecordDict

from server.federation.messaging.exchange import MAX_PULLS, Exchange
from server.federation.messaging.transport import ExchangeError
from server.federation.rounds.site_record import MAX_QUESTIONS
from tests.server.fake_federation import FAST, honest_sites, make_experiment, make_home, rounds_of, run_rounds
from tests.server.fake_grid import FakeGrid, Site


def content(text="hello"):
    return RecordDict({"header": ConfigRecord({"json": text})})


class BlockingGrid(FakeGrid):
    """A pull blocks while the replies of some sites are half uploaded, as Flower's does."""

    blocked: frozenset[int] = frozenset()

    def __post_init__(self):
        super().__post_init__()
        self.release, self.active, self.most_active = threading.Event(), 0, 0
        self.num_blocked = self.most_blocked = 0
        self.node_of = {}

    def push_messages(self, messages):
        messages = list(messages)
        ids = super().push_messages(messages)
        # Answers to offers arrive whole: what is tried here are those of rounds.
        nodes = [0 if "offer" in each.metadata.message_type else each.metadata.dst_node_id for each in messages]
        self.node_of.update(zip(ids, nodes, strict=True))
        return ids

    def pull_messages(self, message_ids):
        (message_id,) = message_ids
        if self.node_of[message_id] in self.blocked:
            self.num_blocked += 1
            self.most_blocked = max(self.most_blocked, self.num_blocked)
            self.release.wait(20)
            self.num_blocked -= 1
            return []
        self.active += 1
        self.most_active = max(self.most_active, self.active)
        time.sleep(0.02)
        replies = super().pull_messages(message_ids)
        self.active -= 1
        return replies


def test_a_reply_stuck_in_its_upload_holds_up_nobody(tmp_path):
    experiment = make_experiment(rounds=1, round_deadline_seconds=4.0)
    home = make_home(tmp_path, experiment)
    grid = BlockingGrid(honest_sites())
    grid.blocked = frozenset({100})
    run_rounds(home, grid, experiment)
    grid.release.set()
    (record,) = rounds_of(home)
    assert [entry["site"] for entry in record["answered"]] == ["site-1", "site-2"]
    assert all(entry["seconds"] < 4 for entry in record["answered"])
    assert [entry["site"] for entry in record["late"]] == ["site-0"]


def test_replies_that_are_there_are_fetched_one_after_the_other(tmp_path):
    experiment = make_experiment(rounds=2)
    home = make_home(tmp_path, experiment, num_sites=8)
    grid = BlockingGrid(honest_sites(8))
    run_rounds(home, grid, experiment)
    assert grid.most_active == 1


def answering_grid(blocked):
    """Seven sites that answer, the replies of `blocked` never uploaded whole."""
    grid = BlockingGrid({100 + index: Site(lambda *_: content("answer")) for index in range(7)})
    grid.blocked = frozenset(blocked)
    return grid


def test_a_site_holds_one_pull_however_many_questions_it_leaves_open():
    grid, arrived, seen = answering_grid({100}), [], threading.Event()
    exchange = Exchange(grid, lambda arrival: (arrived.append(arrival.site), seen.set()), FAST)
    for number in range(6):
        exchange.push(content(f"question {number}"), {"site-0": 100}, 1, time.monotonic() + 60)
    exchange.push(content(), {"site-1": 101}, 1, time.monotonic() + 60)
    assert seen.wait(20)
    exchange.close()
    grid.release.set()
    assert arrived == ["site-1"]
    assert grid.most_blocked == 1


def test_four_stuck_pulls_stop_the_others_only_until_their_questions_expire():
    grid, arrived, seen = answering_grid({100, 101, 102, 103, 104}), [], threading.Event()
    exchange = Exchange(grid, lambda arrival: (arrived.append(arrival.site), seen.set()), FAST)
    exchange.push(content(), {f"site-{index}": 100 + index for index in range(5)}, 1, time.monotonic() + 0.1)
    while grid.most_blocked < MAX_PULLS:
        time.sleep(0.01)
    exchange.push(content(), {"site-6": 106}, 1, time.monotonic() + 60)
    assert seen.wait(20)
    exchange.close()
    grid.release.set()
    assert arrived == ["site-6"]
    assert grid.most_blocked == MAX_PULLS


def test_what_a_hostile_reply_makes_the_decoder_raise_costs_that_reply_only(tmp_path):
    class HostileGrid(BlockingGrid):
        def pull_messages(self, message_ids):
            (message_id,) = message_ids
            if self.node_of[message_id] == 101:
                raise ValueError("Unexpected format for object content.")
            return super().pull_messages(message_ids)

    experiment = make_experiment(rounds=1)
    home = make_home(tmp_path, experiment)
    run_rounds(home, HostileGrid(honest_sites()), experiment)
    (record,) = rounds_of(home)
    assert len(record["answered"]) == 2
    assert [(entry["site"], entry["reason"], entry["questions"]) for entry in record["lost"]] == [
        ("site-1", "unreadable reply (ValueError)", MAX_QUESTIONS)
    ]


def test_a_call_that_never_returns_ends_at_its_deadline():
    class HungGrid(FakeGrid):
        def push_messages(self, messages):
            time.sleep(30)
            return []

    exchange = Exchange(HungGrid({}), lambda _arrival: None, replace(FAST, call_deadline_seconds=0.5))
    start = time.monotonic()
    with pytest.raises(ExchangeError, match="sending round 1"):
        exchange.push(content(), {"site-0": 100}, 1, start + 10)
    assert time.monotonic() - start < 10
    exchange.close()


def test_a_message_that_the_superlink_did_not_take_names_the_site():
    class RefusingGrid(FakeGrid):
        def push_messages(self, messages):
            return [None]

    exchange = Exchange(RefusingGrid({}), lambda _arrival: None, FAST)
    with pytest.raises(ExchangeError, match="site-0"):
        exchange.push(content(), {"site-0": 100}, 1, time.monotonic() + 10)
    exchange.close()


def test_messages_expire_with_the_round_and_are_train_messages():
    seen = []

    class SeeingGrid(FakeGrid):
        def push_messages(self, messages):
            seen.extend(messages)
            return super().push_messages(messages)

    exchange = Exchange(SeeingGrid({100: Site(lambda *_: None)}), lambda _arrival: None, FAST)
    exchange.push(content(), {"site-0": 100}, 3, time.monotonic() + 10)
    exchange.close()
    (message,) = seen
    assert 10 < message.metadata.ttl <= 10 + FAST.late_seconds
    assert (message.metadata.message_type, message.metadata.group_id) == (MessageType.TRAIN, "3")
