"""One round's replies, without a network: what each arrival does to its site's state, to the sum and to the record."""

from types import SimpleNamespace

import numpy as np
import pytest

from server.federation.messaging.exchange import Arrival
from server.federation.rounds import tally as tally_module
from server.federation.rounds.site_record import MAX_QUESTIONS, SiteRecord
from server.federation.rounds.tally import Tally
from shared.messages.packing import Manifest
from shared.messages.training import ReplyHeader, RequestHeader, TrainReply
from shared.updates.fixed_point import CLIP_MARGIN
from tests.server.fake_federation import make_experiment

DIGEST, ROUND = "d" * 64, 3
CENTRAL = {"central_noise_multiplier": 0.7, "max_update_norm": 3.0, "update_norm_action": "clip", "sites_per_round": 2}


class Doubtful:
    """A crowd that halves every update and doubts one site."""

    def __init__(self):
        self.seen = []

    def factor(self, _norm, server_round):
        assert server_round == ROUND
        return 0.5

    def share(self, site):
        return 0.25 if site == "b" else 1.0

    def add(self, site, wire, norm, factor):
        self.seen.append((site, wire.tolist(), norm, factor))


class Keeper:
    def __init__(self):
        self.kept = []

    def keep(self, reply, _wire):
        self.kept.append((reply.site, reply.weight, reply.factor))


def make_tally(*sites, base_digest="", kept=None, crowd=None, **federation):
    header = RequestHeader(
        run="run",
        server_round=ROUND,
        experiment=make_experiment(wire_dtype="float32", **federation),
        precision="float32",
        manifest=Manifest.of({"w": np.zeros(2, np.float32)}),
        base_digest=base_digest,
    )
    records = [SiteRecord(site, number, "once") for number, site in enumerate(sites or ("a", "b"))]
    return Tally(header, DIGEST, records, kept, crowd)


def update(site, *values, server_round=ROUND, **header):
    facts = {"request_digest": DIGEST, "status": "trained"} | header
    wire = None if facts["status"] == "refused" else np.array(values, np.float32)
    return Arrival(site, server_round, SimpleNamespace(content=TrainReply(ReplyHeader(**facts), wire).to_record()))


def refusal(site, code):
    return update(site, status="refused", refusal=code, reason="why")


def test_an_arrival_of_another_round_or_of_a_stranger_or_a_second_one_is_dropped():
    tally = make_tally()
    assert not tally.arrive(update("a", 1, 2, server_round=ROUND - 1))
    assert not tally.arrive(update("stranger", 1, 2))
    assert tally.arrive(update("a", 1, 2))
    assert not tally.arrive(update("a", 3, 3)) and not tally.arrive(refusal("a", "policy"))
    tally.close()
    assert not tally.arrive(update("b", 3, 3))
    assert tally.sum.count == 1 and tally.sum.mean(1).tolist() == [1.0, 2.0]


def test_a_doubted_site_counts_less_in_the_sum_and_where_suspects_are_looked_for_but_is_compared_as_it_came():
    crowd, keeper = Doubtful(), Keeper()
    tally = make_tally(crowd=crowd, kept=keeper, weighting="equal")
    tally.arrive(update("a", 3, -4))
    tally.arrive(update("b", 0, 4))
    assert tally.sum.mean(1) == pytest.approx([1.5, -1.5]) and tally.sum.total_weight == 2
    assert keeper.kept == [("a", 1, 0.5), ("b", 1, 0.125)]
    assert crowd.seen == [("a", [3.0, -4.0], 5.0, 0.5), ("b", [0.0, 4.0], 4.0, 0.5)]
    first, second = tally.as_json()["answered"]
    assert (first["clipped_by"], "share" in first, second["share"]) == (0.5, False, 0.25)


def test_an_update_above_the_bound_is_scaled_in_the_sum_and_the_record_says_so():
    tally = make_tally(max_update_norm=1.0, update_norm_action="clip", weighting="equal")
    tally.arrive(update("a", 3, -4))
    (entry,) = tally.as_json()["answered"]
    assert entry["norm"] == 5.0 and entry["clipped_by"] == pytest.approx(CLIP_MARGIN / 5)
    assert tally.sum.mean(1) == pytest.approx([0.6, -0.8], rel=1e-5)


def test_under_client_level_dp_no_norm_is_in_the_record():
    tally = make_tally(**CENTRAL)
    tally.arrive(update("a", 3, -4))
    (entry,) = tally.as_json()["answered"]
    assert not {"norm", "clipped_by"} & entry.keys()


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_what_went_in_has_one_digest_whatever_the_order(order):
    tally = make_tally(*order)
    for site in order[::-1]:
        tally.arrive(update(site, *{"a": (1, 2), "b": (3, 4)}[site]))
    digest = tally.inputs_digest()
    assert digest == _digest_of_a_then_b()
    other = make_tally(*order)
    for site in order:
        other.arrive(update(site, 1, 2))
    assert other.inputs_digest() != digest


def _digest_of_a_then_b():
    tally = make_tally("a", "b")
    tally.arrive(update("a", 1, 2))
    tally.arrive(update("b", 3, 4))
    return tally.inputs_digest()


def test_a_site_without_the_frozen_tensors_is_asked_once_more_and_no_more():
    tally = make_tally(base_digest="e" * 64)
    tally.arrive(refusal("a", "base_missing"))
    record = tally.sites["a"]
    assert (record.state, record.needs_base) == ("requeued", True)
    tally.ask_again(record, 9, "again")
    assert (record.state, record.questions, record.node_id) == ("asked", 2, 9)
    tally.arrive(refusal("a", "base_missing"))
    assert record.state == "refused"
    plain = make_tally()
    plain.arrive(refusal("a", "base_missing"))
    assert plain.sites["a"].state == "refused", "nothing is frozen, so nothing can be missing"


def test_a_site_that_may_answer_later_waits_and_one_that_failed_has_failed():
    tally = make_tally()
    tally.arrive(Arrival("a", ROUND, None, "node restarted", is_lost=True))
    tally.arrive(Arrival("b", ROUND, None, "crashed"))
    assert [tally.sites[site].state for site in "ab"] == ["requeued", "failed"]
    assert [record.site for record in tally.waiting()] == ["a"]


def test_the_end_of_a_round_tells_the_lost_from_the_late():
    for code, states, codes in (("late", ["lost", "late"], ["lost", "late"]), ("closed", ["late"] * 2, ["closed"] * 2)):
        tally = make_tally()
        tally.requeue(tally.sites["a"], "node restarted")
        tally.close(code, "over")
        assert [tally.sites[site].state for site in "ab"] == states
        assert [tally.sites[site].code for site in "ab"] == codes
        assert [tally.sites[site].reason for site in "ab"] == ["node restarted", "over"]


def test_whatever_a_hostile_reply_makes_the_parser_raise_costs_that_reply_alone(monkeypatch):
    tally = make_tally()

    def parse(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(tally_module.TrainReply, "from_record", parse)
        assert tally.arrive(update("a", 1, 2))
    assert (tally.sites["a"].state, tally.sites["a"].code) == ("rejected", "malformed")
    assert tally.arrive(update("b", 1, 2)) and tally.sum.count == 1


def test_epsilon_of_the_private_part_stands_beside_unbounded_only():
    tally = make_tally("a", "b", "c")
    tally.arrive(update("a", 1, 2, epsilon=2.5, delta=1e-5))
    tally.arrive(update("b", 1, 2, epsilon=2.5, delta=1e-5, is_unbounded=True))
    tally.arrive(update("c", 1, 2, is_unbounded=True))
    found = [(entry["epsilon"], entry.get("dp_epsilon")) for entry in tally.as_json()["answered"]]
    assert found == [(2.5, None), ("unbounded", 2.5), ("unbounded", None)]


def test_replies_that_can_still_come_are_counted():
    tally = make_tally("a", "b", "c")
    tally.arrive(update("a", 1, 2))
    tally.arrive(refusal("b", "policy"))
    assert tally.can_reach(2) and not tally.can_reach(3)


def test_a_site_that_was_asked_often_enough_is_not_asked_again():
    tally = make_tally()
    record = tally.sites["a"]
    for asked in range(1, MAX_QUESTIONS + 1):
        assert (record.state, record.questions) == ("asked", asked)
        tally.arrive(Arrival("a", ROUND, None, "node restarted", is_lost=True))
        tally.ask_again(record, 9, "again")
    assert (record.state, record.questions) == ("lost", MAX_QUESTIONS)
