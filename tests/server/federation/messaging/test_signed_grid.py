"""One registered site against the others: whoever answers in another's name is not counted, and costs it nothing."""

import json

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.app.metadata import Metadata

from server.federation.fleet.registry import Registry
from server.federation.messaging import exchange, signed_grid
from server.federation.messaging.signed_grid import SignedGrid
from shared.errors import InputError
from shared.messages.sealing import SEAL, digests_of, read_seal, seal_reply
from shared.messages.signature import PURPOSES
from shared.messages.training import TrainRequest
from tests.server.fake_federation import (
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
from tests.signing import key_of, pem_of, public_of, signed_reply

SILENT, EVIL = "site-1", "site-2"


def forged(content: RecordDict, source: int, reply_to: str, destination: int = 1) -> Message:
    """A message as a registered key can push it by hand: every field of the metadata is the sender's choice."""
    about = Metadata(
        run_id=1,
        message_id="",
        src_node_id=source,
        dst_node_id=destination,
        reply_to_message_id=reply_to,
        group_id="1",
        created_at=1.0,
        ttl=1000.0,
        message_type="train",
    )
    message = Message.__new__(Message)
    message.__dict__.update({"_metadata": about, "_content": content, "_error": None})
    return message


class InjectingGrid(FakeGrid):
    """Hands over, with any pull, what was pushed to the coordinator's own address, as the SuperLink does; one each."""

    def __post_init__(self):
        super().__post_init__()
        self.injected = []

    def pull_messages(self, message_ids):
        injected = [self.injected.pop(0)] if self.injected else []
        return [*injected, *super().pull_messages(message_ids)]


def attack(grid, make):
    """Site-2 answers honestly, and injects `make(request, its honest answer)`; site-1 stays silent."""

    def evil(content, _asked):
        answer = trained(EVIL, content)
        grid.injected += make(content, answer)
        return answer

    grid.sites = honest_sites(site_1=lambda *_: None, site_2=evil)
    return grid


def instruction(content, _answer):
    """As seen in the wild: from the coordinator to itself, answering nothing, unsigned; one for each site."""
    request = TrainRequest.from_record(content)
    return [forged(reply(request, np.full(request.weights.shape, 0.1, np.float32)), 1, "") for _ in range(3)]


def named(key, source, **changed):
    """A reply to the silent site's own question (its id is message-1), signed with `key`."""

    place = {"alias": SILENT, **changed}

    def make(content, _answer):
        request = TrainRequest.from_record(content)
        answer = reply(request, np.full(request.weights.shape, 0.1, np.float32))
        return [forged(signed_reply(answer, content, "train", key_of(key), **place), source, "message-1")]

    return make


def stripped(content, _answer):
    request = TrainRequest.from_record(content)
    return [forged(reply(request, np.zeros(request.weights.shape, np.float32)), 101, "message-1")]


def own_answer_again(content, answer):
    """Site-2's own, honestly signed answer under the silent site's question."""
    return [forged(signed_reply(answer, content, "train", key_of(EVIL)), 101, "message-1")]


ATTACKS = {
    "instruction to the coordinator itself": instruction,
    "the silent site's alias, the attacker's key": named(EVIL, 101),
    "the attacker's node": named(SILENT, 102),
    "no signature": stripped,
    "the attacker's own answer": own_answer_again,
    "an old reply: another round": named(SILENT, 101, server_round=0),
    "an old reply: another run": named(SILENT, 101, run="run-0"),
    "an old reply: another request": named(SILENT, 101, request_digest="0" * 64),
    "another kind of question": named(SILENT, 101, purpose="audit"),
}


def every_attack(content, answer):
    return [message for make in ATTACKS.values() for message in make(content, answer)]


def test_nobody_answers_for_a_silent_site(tmp_path):
    """One round with all of them: it waits for its deadline, and whatever were taken would be the site's answer."""
    experiment = make_experiment(rounds=1, round_deadline_seconds=2.5)
    home = make_home(tmp_path, experiment)
    grid = attack(InjectingGrid({}), every_attack)
    run_rounds(home, grid, experiment)
    (record,) = rounds_of(home)
    assert [entry["site"] for entry in record["answered"]] == ["site-0", EVIL]
    assert [entry["site"] for entry in record["late"]] == [SILENT]
    # Three instructions, and one message of every other attack.
    assert not grid.injected and record["forged"]["count"] == len(ATTACKS) + 2


def test_without_the_check_the_forged_answer_of_a_silent_site_is_counted(tmp_path, monkeypatch):
    """The attack itself works: it is the check that stops it, and nothing else."""
    monkeypatch.setattr(SignedGrid, "forgery", lambda *_: "")
    monkeypatch.setattr(exchange, "forgery", lambda *_: "")
    experiment = make_experiment(rounds=1, round_deadline_seconds=2.5)
    home = make_home(tmp_path, experiment)
    run_rounds(home, attack(InjectingGrid({}), instruction), experiment)
    (record,) = rounds_of(home)
    assert SILENT in [entry["site"] for entry in record["answered"]]


def test_the_honest_reply_is_counted_after_the_forged_ones(tmp_path):
    experiment = make_experiment(rounds=1)
    plain, attacked = make_home(tmp_path / "plain", experiment), make_home(tmp_path / "attacked", experiment)
    run_rounds(plain, FakeGrid(honest_sites()), experiment)
    grid = attack(InjectingGrid({}), every_attack)
    grid.sites[101] = Site(lambda content, _: trained(SILENT, content), delay_seconds=0.5)
    run_rounds(attacked, grid, experiment)
    (record,) = rounds_of(attacked)
    assert [entry["site"] for entry in record["answered"]] == ["site-0", SILENT, EVIL]
    assert same(weights_of(plain, 1), weights_of(attacked, 1))


def test_swapped_arrays_under_a_valid_header_are_not_counted(tmp_path):
    def swapped(content, _asked):
        answer = signed_reply(trained(SILENT, content), content, "train", key_of(SILENT))
        other = reply(TrainRequest.from_record(content), np.ones(58, np.float32))
        return RecordDict({**answer, "arrays": other["arrays"]})

    experiment = make_experiment(rounds=1, round_deadline_seconds=2.5)
    home = make_home(tmp_path, experiment)
    run_rounds(home, FakeGrid(honest_sites(site_1=swapped)), experiment)
    assert [entry["site"] for entry in rounds_of(home)[0]["late"]] == [SILENT]
    assert rounds_of(home)[0]["forged"]["first"][0]["site"] == SILENT


def test_a_site_that_does_not_sign_is_not_counted(tmp_path):
    experiment = make_experiment(rounds=1, round_deadline_seconds=2.5)
    home = make_home(tmp_path, experiment)
    sites = honest_sites()
    sites[101].is_signing = False
    run_rounds(home, FakeGrid(sites), experiment)
    assert [entry["site"] for entry in rounds_of(home)[0]["late"]] == [SILENT]


def test_a_site_without_a_signing_key_in_the_registry_is_not_asked(tmp_path):
    """It would train, and spend, for an answer that nobody could check."""
    experiment = make_experiment(rounds=1, min_replies=2, min_available=2)
    home = make_home(tmp_path, experiment)
    entries = json.loads((home / "sites.json").read_text())["sites"]
    entries[1].pop("signing_key")
    (home / "sites.json").write_text(json.dumps({"sites": entries}))
    grid = FakeGrid(honest_sites())
    run_rounds(home, grid, experiment)
    assert [entry["site"] for entry in rounds_of(home)[0]["answered"]] == ["site-0", "site-2"]
    assert grid.sites[101].asked == 0
    with pytest.raises(InputError, match="no registered site with a signing key"):
        signed(home, grid).push_messages([question(101)])


def signed(home, grid, run="run"):
    return SignedGrid(grid, home, run)


def question(node_id, message_type="train", group_id="1"):
    content = RecordDict({"arrays": ArrayRecord({"x": Array(np.ones(2))}), "header": ConfigRecord({"json": "{}"})})
    return Message(content, node_id, message_type, ttl=60, group_id=group_id)


@pytest.fixture
def home(tmp_path):
    return make_home(tmp_path, make_experiment())


@pytest.mark.parametrize("message_type", PURPOSES)
def test_every_kind_of_question_leaves_signed_for_one_site(home, message_type):
    grid = FakeGrid({100: Site(lambda *_: None), 101: Site(lambda *_: None)})
    messages = [question(100, message_type, "7"), question(101, message_type, "7")]
    signed(home, grid).push_messages(messages)
    seals = [read_seal(message.content, "request") for message in messages]
    assert [(seal.alias, seal.run, seal.server_round) for seal in seals] == [("site-0", "run", 7), ("site-1", "run", 7)]
    assert seals[0].signature != seals[1].signature
    assert messages[0].content["header"] == messages[1].content["header"]


def test_a_kind_of_question_without_a_purpose_is_not_sent(home):
    grid = FakeGrid({100: Site(lambda *_: None)})
    with pytest.raises(KeyError):
        signed(home, grid).push_messages([question(100, "evaluate")])
    assert grid.sites[100].asked == 0


def test_a_message_that_is_pushed_again_keeps_its_signature(home):
    message, border = question(100), signed(home, FakeGrid({100: Site(lambda *_: None)}))
    border.push_messages([message])
    first = message.content[SEAL]
    border.push_messages([message])
    assert message.content[SEAL] == first


def test_errors_of_flower_reach_the_round_and_errors_nobody_waits_for_do_not(home):
    grid = InjectingGrid({100: Site(lambda *_: Error(5, "away"))})
    border = signed(home, grid)
    (message_id,) = border.push_messages([question(100)])
    stray = forged(None, 101, "message-9")
    stray.__dict__["_error"] = Error(5, "away")
    grid.injected.append(stray)
    found = []
    while not found:
        found = [each for each in border.pull_messages([message_id]) if not border.forgery(each)]
    assert [message.metadata.reply_to_message_id for message in found] == [message_id]


def test_what_makes_the_check_itself_fail_costs_that_message_only(home, monkeypatch):
    def explode(_):
        raise MemoryError

    grid = InjectingGrid({100: Site(lambda *_: None)})
    border = signed(home, grid)
    (message_id,) = border.push_messages([question(100)])
    monkeypatch.setattr(signed_grid, "digests_of", explode)
    assert "MemoryError" in border.forgery(forged(RecordDict(), 100, message_id))


def test_a_signing_key_that_was_renewed_counts_from_then_on(home):
    content = RecordDict({"header": ConfigRecord({"json": "{}"})})
    grid = InjectingGrid({100: Site(lambda *_: None)})
    border = signed(home, grid)
    message = question(100)
    (message_id,) = border.push_messages([message])
    asked = read_seal(message.content, "request").statement("train", "site-0", digests_of(message.content))
    Registry(home / "sites.json").renew("site-0", "ecdsa-sha2-nistp384 key0", public_of("new"))
    for signer, is_counted in (("site-0", False), ("new", True)):
        answer = forged(seal_reply(content, asked, key_of(signer)), 100, message_id)
        assert (not border.forgery(answer)) is is_counted


def test_a_federation_without_a_request_key_says_what_makes_it(home):
    (home / "pki" / "request.pem").unlink()
    with pytest.raises(InputError, match="maskfed-server renew"):
        signed(home, FakeGrid({}))
    (home / "pki" / "request.pem").write_bytes(pem_of(key_of("x")))
    (home / "pki" / "request.pem").chmod(0o600)
    with pytest.raises(InputError, match="holds no certificate"):
        signed(home, FakeGrid({}))
