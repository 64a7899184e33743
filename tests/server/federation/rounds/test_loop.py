import time

import httpx
import numpy as np
import pytest
from flwr.app import Array, Error, RecordDict
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError

from server.federation.evaluation_queue import Evaluations
from server.federation.fleet.registry import Registry
from server.federation.rounds.giving_up import RunFailedError
from server.federation.rounds.site_record import MAX_QUESTIONS
from server.federation.rounds.tally import Tally
from server.federation.updates import global_model
from shared.messages.training import ReplyHeader, TrainReply, TrainRequest
from tests.server.fake_federation import (
    events_of,
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
from tests.server.fake_grid import FakeGrid


def nan_reply(content, _asked):
    request = TrainRequest.from_record(content)
    delta = np.zeros(request.weights.shape, np.float32)
    delta[40] = np.nan
    return reply(request, delta)


def huge_reply(content, _asked):
    request = TrainRequest.from_record(content)
    return reply(request, np.full(request.weights.shape, 3.9, np.float32))


def refusal(content, _asked):
    request = TrainRequest.from_record(content)
    header = ReplyHeader(
        request_digest=request.digest, status="refused", refusal="budget_exceeded", reason="cap 3 reached"
    )
    return TrainReply(header).to_record()


def short_reply(content, _asked):
    request = TrainRequest.from_record(content)
    return reply(request, np.zeros(3, np.float32))


def wrong_dtype(content, _asked):
    request = TrainRequest.from_record(content)
    header = ReplyHeader(request_digest=request.digest, status="trained")
    return TrainReply(header, np.zeros(request.weights.shape, np.float64)).to_record()


def empty_reply(_content, _asked):
    return RecordDict()


def lying_array(content, _asked):
    """Says the agreed shape, but its bytes announce a million million elements."""
    record = trained("site-1", content)
    array = record.array_records["arrays"]["update"]
    data = array.data.replace(b"(58,)", b"(1000000000000,)".ljust(5), 1)
    record.array_records["arrays"]["update"] = Array(array.dtype, array.shape, array.stype, data)
    return record


def escape_refusal(content, _asked):
    request = TrainRequest.from_record(content)
    header = ReplyHeader(
        request_digest=request.digest, status="refused", refusal="failed", reason="\x1b[2J\nall is well"
    )
    return TrainReply(header).to_record()


def unread(_content, _asked):
    """A site that did not read the request, since it is not signed for it, does not know its digest."""
    header = ReplyHeader(request_digest="0" * 64, status="refused", refusal="not_signed", reason="not for this site")
    return TrainReply(header).to_record()


def stale_reply(content, _asked):
    return trained("site-1", content, request_digest="0" * 64)


def greedy_reply(content, _asked):
    return trained("site-1", content, num_examples=10**12)


@pytest.fixture
def two_site_weights(tmp_path):
    """What sites 0 and 2 alone arrive at after one round."""
    experiment = make_experiment(rounds=1)
    home = make_home(tmp_path / "two", experiment)
    Registry(home / "sites.json").revoke("site-1")
    run_rounds(home, FakeGrid(honest_sites()), experiment)
    return weights_of(home, 1)


@pytest.mark.parametrize(
    ("answer", "state", "code"),
    [
        (nan_reply, "rejected", "not_finite"),
        (short_reply, "rejected", "malformed"),
        (wrong_dtype, "rejected", "dtype"),
        (huge_reply, "rejected", "norm"),
        (stale_reply, "rejected", "stale"),
        (empty_reply, "late", "late"),
        (lying_array, "rejected", "malformed"),
        (escape_refusal, "failed", "failed"),
        (refusal, "refused", "budget_exceeded"),
        (unread, "refused", "not_signed"),
        (lambda _content, _asked: Error(2, "<class 'RuntimeError'>:<'no'>"), "failed", "failed"),
        (lambda _content, _asked: None, "late", "late"),
    ],
)
def test_the_other_two_sites_decide_the_round_and_the_record_says_why(tmp_path, two_site_weights, answer, state, code):
    experiment = make_experiment(rounds=1, max_update_norm=5.0, round_deadline_seconds=2.5 if state == "late" else 30.0)
    home = make_home(tmp_path, experiment)
    run_rounds(home, FakeGrid(honest_sites(site_1=answer)), experiment)
    record = rounds_of(home)[0]
    assert [entry["site"] for entry in record["answered"]] == ["site-0", "site-2"]
    assert [(entry["site"], entry["code"]) for entry in record[state]] == [("site-1", code)]
    assert all(letter.isprintable() for letter in record[state][0]["reason"])
    assert record["weights_changed"]
    assert same(weights_of(home, 1), two_site_weights)


def test_what_a_site_has_spent_is_recorded_with_delta_unit_and_the_dp_part_of_an_unbounded_total(tmp_path):
    experiment = make_experiment(rounds=1)
    home = make_home(tmp_path, experiment)
    spent = {"epsilon": 2.5, "delta": 1e-6, "epsilon_cap": 8.0, "unit": "person"}
    sites = honest_sites(
        site_0=lambda content, _: trained("site-0", content, **spent),
        site_1=lambda content, _: trained("site-1", content, **spent, is_unbounded=True),
        site_2=lambda content, _: trained("site-2", content, epsilon=0.0, is_unbounded=True),
    )
    run_rounds(home, FakeGrid(sites), experiment)
    names = (*spent, "dp_epsilon")
    found = [{name: entry[name] for name in names if name in entry} for entry in rounds_of(home)[0]["answered"]]
    nothing = {"delta": None, "epsilon_cap": None, "unit": None}
    assert found == [
        spent,
        spent | {"epsilon": "unbounded", "dp_epsilon": 2.5},
        nothing | {"epsilon": "unbounded"},
    ]


def test_a_site_that_claims_a_million_million_images_counts_no_more_than_the_clamp(tmp_path):
    experiment = make_experiment(rounds=1, weighting="examples", max_examples=1000, max_weight=20)
    home = make_home(tmp_path, experiment)
    run_rounds(home, FakeGrid(honest_sites(site_1=greedy_reply)), experiment)
    assert {entry["site"]: entry["weight"] for entry in rounds_of(home)[0]["answered"]} == {
        "site-0": 1,
        "site-1": 10,
        "site-2": 1,
    }


def test_a_late_reply_is_dropped_with_a_record_and_does_not_touch_the_next_round(tmp_path):
    experiment = make_experiment(rounds=2, round_deadline_seconds=2.0)
    home = make_home(tmp_path, experiment)
    sites = honest_sites()
    honest = sites[101].answer

    def slow_once(content, asked):
        if asked == 1:
            time.sleep(2.5)
        return honest(content, asked)

    sites[101].answer = slow_once
    sites[102].delay_seconds = 1.0
    run_rounds(home, FakeGrid(sites), experiment)
    first, second = rounds_of(home)
    assert [entry["site"] for entry in first["late"]] == ["site-1"]
    assert [event["site"] for event in events_of(home, "late_reply")] == ["site-1"]
    assert events_of(home, "late_reply")[0]["round"] == 1
    assert [entry["site"] for entry in second["answered"]] == ["site-0", "site-1", "site-2"]


def test_weights_do_not_depend_on_the_order_of_arrival(tmp_path):
    results = []
    for delays in ((0.0, 0.1, 0.2), (0.2, 0.1, 0.0)):
        experiment = make_experiment(rounds=2)
        home = make_home(tmp_path / str(delays), experiment)
        sites = honest_sites()
        for site, delay in zip(sites.values(), delays, strict=True):
            site.delay_seconds = delay
        run_rounds(home, FakeGrid(sites), experiment)
        results.append(weights_of(home, 2))
    assert same(*results)


def test_a_run_whose_sites_all_fail_is_a_failed_run(tmp_path):
    experiment = make_experiment(min_replies=1)
    home = make_home(tmp_path, experiment)
    grid = FakeGrid(honest_sites(site_0=refusal, site_1=refusal, site_2=refusal))
    with pytest.raises(RunFailedError, match="site-0 refused") as caught:
        run_rounds(home, grid, experiment)
    assert caught.value.is_final
    assert events_of(home, "end")[-1]["status"] == "failed"
    assert rounds_of(home) == []


def test_too_few_replies_keep_the_weights_and_say_so(tmp_path):
    experiment = make_experiment(rounds=2, min_replies=3)
    home = make_home(tmp_path, experiment)

    def refuses_first(content, asked):
        return refusal(content, asked) if asked == 1 else trained("site-1", content)

    run_rounds(home, FakeGrid(honest_sites(site_1=refuses_first)), experiment)
    first, second = rounds_of(home)
    assert not first["weights_changed"]
    assert "min_replies" in first["reason"]
    assert second["weights_changed"]
    assert same(weights_of(home, 0), weights_of(home, 1))
    assert not same(weights_of(home, 1), weights_of(home, 2))


def test_a_run_that_never_changed_its_weights_is_a_failed_run(tmp_path):
    experiment = make_experiment(rounds=2, min_replies=3)
    home = make_home(tmp_path, experiment)
    with pytest.raises(RunFailedError, match="never changed"):
        run_rounds(home, FakeGrid(honest_sites(site_1=refusal)), experiment)


def test_a_round_that_cannot_reach_min_replies_ends_at_once_and_the_run_stops(tmp_path):
    experiment = make_experiment(rounds=9, min_replies=3)
    home = make_home(tmp_path, experiment)
    sites = honest_sites(site_1=refusal)
    sites[102].delay_seconds = 60.0
    with pytest.raises(RunFailedError, match="did not change in 3 rounds in a row") as caught:
        run_rounds(home, FakeGrid(sites), experiment)
    assert caught.value.is_final
    records = rounds_of(home)
    assert len(records) == 3
    assert [entry["code"] for entry in records[0]["late"]] == ["closed"] * len(records[0]["late"])
    assert "cannot be reached any more" in next(entry for entry in records[0]["late"])["reason"]


def test_under_dp_sgd_one_unchanged_round_ends_the_run(tmp_path):
    experiment = make_experiment(rounds=5, min_replies=3)
    privacy = experiment.privacy.model_copy(update={"mechanism": "dp-sgd"})
    experiment = experiment.model_copy(update={"privacy": privacy})
    home = make_home(tmp_path, experiment)
    with pytest.raises(RunFailedError, match="in 1 rounds"):
        run_rounds(home, FakeGrid(honest_sites(site_1=refusal)), experiment)
    assert len(rounds_of(home)) == 1


def test_a_round_closes_at_quorum_and_grace_and_a_repeated_one_has_the_same_bits(tmp_path, monkeypatch):
    experiment = make_experiment(rounds=1, quorum=2, quorum_grace_seconds=0.2)
    home = make_home(tmp_path, experiment)
    slow = honest_sites()
    slow[100].delay_seconds = 60.0
    save = global_model.save_checkpoint

    def dies(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(global_model, "save_checkpoint", dies)
    with pytest.raises(KeyboardInterrupt):
        run_rounds(home, FakeGrid(slow), experiment)
    monkeypatch.setattr(global_model, "save_checkpoint", save)
    # The site that was too slow is fast now, the others are slow: who closed the round decides all the same.
    sites = honest_sites()
    sites[101].delay_seconds = sites[102].delay_seconds = 0.5
    run_rounds(home, FakeGrid(sites), experiment)
    (record,) = rounds_of(home)
    assert [entry["site"] for entry in record["answered"]] == ["site-1", "site-2"]
    alone = make_home(tmp_path / "alone", experiment)
    Registry(alone / "sites.json").revoke("site-0")
    run_rounds(alone, FakeGrid(honest_sites()), experiment)
    assert same(weights_of(home, 1), weights_of(alone, 1))


def test_a_site_that_refuses_three_times_is_set_aside_and_asked_again_later(tmp_path):
    experiment = make_experiment(rounds=10)
    home = make_home(tmp_path, experiment)
    run_rounds(home, FakeGrid(honest_sites(site_1=refusal)), experiment)
    asked = [record["round"] for record in rounds_of(home) if {"site": "site-1"} in record["asked"]]
    assert asked == [1, 2, 3, 5, 8]


def test_nobody_is_set_aside_when_too_few_would_be_left(tmp_path):
    experiment = make_experiment(rounds=5, min_replies=1, min_available=3)
    home = make_home(tmp_path, experiment)
    run_rounds(home, FakeGrid(honest_sites(site_1=refusal)), experiment)
    assert all({"site": "site-1"} in record["asked"] for record in rounds_of(home))


def test_a_lost_site_is_asked_again_and_its_reply_counts(tmp_path):
    experiment = make_experiment(rounds=1)
    home = make_home(tmp_path, experiment)

    def crashes_once(content, asked):
        return Error(8, "ClientApp stopped responding.") if asked == 1 else trained("site-1", content)

    run_rounds(home, FakeGrid(honest_sites(site_1=crashes_once)), experiment)
    answered = {entry["site"]: entry for entry in rounds_of(home)[0]["answered"]}
    assert answered["site-1"]["questions"] == 2


def test_a_site_that_is_lost_every_time_is_asked_so_many_times_and_no_more(tmp_path):
    experiment = make_experiment(rounds=1)
    home = make_home(tmp_path, experiment)
    sites = honest_sites(site_1=lambda *_: Error(8, "ClientApp stopped responding."))
    run_rounds(home, FakeGrid(sites), experiment)
    assert sites[101].asked == MAX_QUESTIONS
    assert rounds_of(home)[0]["lost"][0]["questions"] == MAX_QUESTIONS


def test_a_site_that_stays_away_is_lost_and_the_round_goes_on(tmp_path, two_site_weights):
    experiment = make_experiment(rounds=1)
    home = make_home(tmp_path, experiment)
    sites = honest_sites()

    def vanishes(_content, _asked):
        sites[101].is_online = False
        return Error(5, "Node Unavailable")

    sites[101].answer = vanishes
    run_rounds(home, FakeGrid(sites), experiment)
    assert [entry["site"] for entry in rounds_of(home)[0]["lost"]] == ["site-1"]
    assert same(weights_of(home, 1), two_site_weights)


def test_a_site_whose_node_was_restarted_in_the_round_is_asked_again(tmp_path):
    experiment = make_experiment(rounds=1)
    home = make_home(tmp_path, experiment)
    grid = FakeGrid({})

    def forgets_once(content, asked):
        if asked == 1:
            grid.activated[101] = "2026-01-01T00:05:00+00:00"
            return None
        return trained("site-1", content)

    grid.sites.update(honest_sites(site_1=forgets_once))
    run_rounds(home, grid, experiment)
    assert len(rounds_of(home)[0]["answered"]) == 3


def test_http_500_lost_connections_and_broken_uploads_are_tried_again(tmp_path):
    experiment = make_experiment(rounds=1)
    home = make_home(tmp_path, experiment)
    request = httpx.Request("POST", "http://superlink")
    broken = httpx.HTTPStatusError("locked", request=request, response=httpx.Response(500, request=request))
    upload = ObjectPushError("ab" * 32, 17, "session")
    grid = FakeGrid(honest_sites(), failures=[broken, httpx.ConnectError("gone"), broken, upload, broken, upload])
    run_rounds(home, grid, experiment)
    assert len(rounds_of(home)[0]["answered"]) == 3


def test_no_sites_online_ends_in_a_failure_that_names_them(tmp_path):
    experiment = make_experiment(available_deadline_seconds=0.3)
    home = make_home(tmp_path, experiment)
    sites = honest_sites()
    for site in sites.values():
        site.is_online = False
    with pytest.raises(RunFailedError, match="site-0, site-1, site-2") as caught:
        run_rounds(home, FakeGrid(sites), experiment)
    assert not caught.value.is_final


def test_selection_is_seeded_and_changes_with_the_round(tmp_path):
    experiment = make_experiment(rounds=4, sites_per_round=2, min_replies=1)
    chosen = []
    for attempt in ("a", "b"):
        home = make_home(tmp_path / attempt, experiment, num_sites=6)
        run_rounds(home, FakeGrid(honest_sites(6)), experiment)
        chosen.append([[entry["site"] for entry in record["asked"]] for record in rounds_of(home)])
    assert chosen[0] == chosen[1]
    assert len({tuple(names) for names in chosen[0]}) > 1


def test_a_fraction_of_the_registered_sites_is_rounded_up(tmp_path):
    experiment = make_experiment(rounds=1, sites_fraction=0.4, min_replies=1)
    home = make_home(tmp_path, experiment, num_sites=6)
    run_rounds(home, FakeGrid(honest_sites(6)), experiment)
    assert len(rounds_of(home)[0]["asked"]) == 3


def test_frozen_tensors_travel_only_to_a_site_that_lacks_them_and_never_change(tmp_path):
    experiment = make_experiment(rounds=2, trainable=("attention",))
    home = make_home(tmp_path, experiment)
    held = set()

    def lacks_base(content, _asked):
        request = TrainRequest.from_record(content)
        if request.base is not None:
            held.add(request.header.base_digest)
        if request.header.base_digest not in held:
            header = ReplyHeader(request_digest=request.digest, status="refused", refusal="base_missing")
            return TrainReply(header).to_record()
        return trained("site-1", content)

    run_rounds(home, FakeGrid(honest_sites(site_1=lacks_base)), experiment)
    before, after = weights_of(home, 0), weights_of(home, 2)
    assert not np.array_equal(before["a.attention.weight"], after["a.attention.weight"])
    assert np.array_equal(before["a.mlp.weight"], after["a.mlp.weight"])
    assert [{entry["bytes"] for entry in record["answered"]} for record in rounds_of(home)] == [{4 * 35}, {4 * 35}]
    first, second = (record["bytes_sent"] for record in rounds_of(home))
    assert first > second


def test_bytes_and_weights_of_each_wire(tmp_path):
    """Each site's update is told within half a scale of its largest number."""
    sizes, weights = {}, {}
    for dtype in ("float32", "bfloat16", "int8"):
        experiment = make_experiment(rounds=1, wire_dtype=dtype)
        home = make_home(tmp_path / dtype, experiment)
        run_rounds(home, FakeGrid(honest_sites()), experiment)
        sizes[dtype] = rounds_of(home)[0]["bytes_received"]
        weights[dtype] = weights_of(home, 1)["a.attention.weight"]
    assert sizes["float32"] == 2 * sizes["bfloat16"] == 3 * 4 * 58 and sizes["int8"] == 3 * (58 + 4)
    assert 0 < np.abs(weights["int8"] - weights["float32"]).max() < 0.4 / 127


def test_old_checkpoints_go_and_every_kth_stays(tmp_path):
    experiment = make_experiment(rounds=7)
    train = experiment.train.model_copy(update={"keep_last": 2, "keep_every": 3})
    experiment = experiment.model_copy(update={"train": train})
    home = make_home(tmp_path, experiment)
    run_rounds(home, FakeGrid(honest_sites()), experiment)
    kept = sorted(path.name for path in (home / "runs" / "run" / "checkpoints").iterdir())
    assert kept == ["round-000000", "round-000003", "round-000006", "round-000007"]


def test_what_went_into_the_sum_is_told_by_the_digest_of_each_update(tmp_path, monkeypatch):
    seen, tell = [], Tally.inputs_digest

    def look(tally):
        seen.append([record.update_digest for record in tally.in_state("answered")])
        return tell(tally)

    monkeypatch.setattr(Tally, "inputs_digest", look)
    experiment = make_experiment(rounds=2)
    run_rounds(make_home(tmp_path, experiment), FakeGrid(honest_sites()), experiment)
    assert all(len(digest) == 64 for digests in seen for digest in digests)
    assert len(seen) == 2 and seen[0] and not set(seen[0]) & set(seen[1])


def test_a_checkpoint_that_an_evaluation_still_reads_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(Evaluations, "oldest_needed", lambda _: 3)
    experiment = make_experiment(rounds=5)
    train = experiment.train.model_copy(update={"keep_last": 1, "keep_every": 0})
    experiment = experiment.model_copy(update={"train": train})
    home = make_home(tmp_path, experiment)
    run_rounds(home, FakeGrid(honest_sites()), experiment)
    kept = sorted(path.name for path in (home / "runs" / "run" / "checkpoints").iterdir())
    assert kept == ["round-000003", "round-000004", "round-000005"]


@pytest.mark.parametrize(("others", "is_final"), [(refusal, True), (lambda *_: Error(8, "stopped"), False)])
def test_a_round_without_a_reply_may_be_tried_again_where_a_site_may_come_back(tmp_path, others, is_final):
    experiment = make_experiment(min_replies=1)
    home = make_home(tmp_path, experiment)
    with pytest.raises(RunFailedError, match="no usable reply") as caught:
        run_rounds(home, FakeGrid(honest_sites(site_0=refusal, site_1=others, site_2=refusal)), experiment)
    assert caught.value.is_final == is_final == events_of(home, "end")[-1]["is_final"]
