"""A run's sites compared: streaming, the same in any order and after a crash, and blind where nobody may look."""

import itertools
import json
import stat

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save

from server.federation.acceptance.crowd import FOLDER, KEY_FILE, MAX_NORM_RATIO, Crowd
from server.federation.acceptance.persistence import LEAST_ROUNDS, LEAST_SITES
from server.federation.acceptance.trust import trust
from shared.messages.training import TrainRequest
from shared.seeding import derive_seed
from tests.server.fake_federation import (
    events_of,
    honest_sites,
    make_experiment,
    make_home,
    reply,
    rounds_of,
    run_rounds,
    same,
    weights_of,
)
from tests.server.fake_grid import FakeGrid

SITES = [f"site-{number}" for number in range(6)]
SIZE = 300


def updates(server_round, pushes=(), size=SIZE):
    """Noise for each site, new in every round; those of `pushes` add a way of their own, within the same length."""
    random = np.random.default_rng(server_round)
    made = {site: random.normal(size=size) for site in SITES}
    for site in pushes:
        way = np.random.default_rng(99).normal(size=size)
        made[site] = 0.6 * made[site] + 0.8 * way
    return {site: each.astype(np.float32) for site, each in made.items()}


def go_on(crowd, rounds, pushes=(), order=SITES):
    for number in rounds:
        made = updates(number, pushes)
        for site in order:
            crowd.add(site, made[site], float(np.linalg.norm(made[site])), 1.0)
        found = crowd.take_in(number)
    return found


@pytest.fixture
def crowd(tmp_path):
    made = Crowd(tmp_path, make_experiment())
    made.begin(0)
    return made


def test_a_site_that_pushes_the_same_way_stands_out_and_honest_ones_do_not(crowd):
    assert go_on(crowd, range(1, 3), ["site-4"]).persistence == {}
    found = go_on(crowd, range(3, 7), ["site-4"])
    assert crowd.shares.keys() == {"site-4"} and found.as_json()["site"] == "site-4"
    assert crowd.share("site-4") == crowd.shares["site-4"] < 0.6 and crowd.share("site-0") == 1.0


def test_whom_the_operator_trusts_counts_in_full(crowd, tmp_path):
    go_on(crowd, range(1, 6), ["site-4"])
    trust(tmp_path, "site-4")
    assert crowd.share("site-4") == 1.0 and crowd.shares.keys() == {"site-4"}


def test_who_does_not_answer_stays_doubted_and_who_stops_pushing_does_not(crowd):
    go_on(crowd, range(1, 6), ["site-4"])
    share = crowd.share("site-4")
    go_on(crowd, [6], order=[site for site in SITES if site != "site-4"])
    assert crowd.share("site-4") == share < 1
    go_on(crowd, range(7, 20))
    assert crowd.share("site-4") == 1.0


def test_two_that_push_together_stand_out_both(crowd):
    go_on(crowd, range(1, 7), ["site-1", "site-4"])
    assert crowd.shares.keys() == {"site-1", "site-4"}


def test_the_order_of_arrival_changes_nothing(tmp_path):
    found = []
    key = bytes(32)
    for number, order in enumerate([SITES, SITES[::-1], SITES[3:] + SITES[:3]]):
        folder = tmp_path / str(number) / FOLDER
        folder.mkdir(parents=True)
        (folder / KEY_FILE).write_bytes(key)
        crowd = Crowd(folder.parent, make_experiment())
        crowd.begin(0)
        found.append(go_on(crowd, range(1, 5), order=order))
    assert found[0] == found[1] == found[2] and found[0].persistence


def test_a_round_that_is_repeated_after_a_crash_comes_to_the_same(crowd, tmp_path):
    go_on(crowd, range(1, 4))
    undisturbed = go_on(crowd, [4, 5])
    for last in (3, 4):  # the checkpoint of round 4 is missing, or there
        other = Crowd(tmp_path / str(last), make_experiment())
        (tmp_path / str(last) / FOLDER).mkdir(parents=True)
        (tmp_path / str(last) / FOLDER / KEY_FILE).write_bytes((tmp_path / FOLDER / KEY_FILE).read_bytes())
        other.begin(0)
        go_on(other, range(1, 5))
        again = Crowd(tmp_path / str(last), make_experiment())
        again.begin(last)
        assert go_on(again, range(last + 1, 6)) == undisturbed


def test_what_is_remembered_is_private_and_of_two_rounds(crowd, tmp_path):
    go_on(crowd, range(1, 5))
    folder = tmp_path / FOLDER
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {
        "key": 0o600,
        "round-000003.safetensors": 0o600,
        "round-000004.safetensors": 0o600,
    }


@pytest.mark.parametrize("damage", ["round-000003.safetensors", "key"])
@pytest.mark.parametrize("how", [b"", b"x" * 40, None])
def test_what_is_damaged_or_gone_is_begun_anew(crowd, tmp_path, damage, how):
    go_on(crowd, range(1, 4))
    file = tmp_path / FOLDER / damage
    file.unlink() if how is None else file.write_bytes(how)
    again = Crowd(tmp_path, make_experiment())
    again.begin(3)
    assert again.factor(1e9, 4) == 1.0 and go_on(again, [4]).persistence == {}


def rewritten(file, change):
    """The file with other facts and sketches, as `change` makes them."""
    with safe_open(file, "numpy") as stored:
        facts = {name: json.loads(text) for name, text in stored.metadata().items()}
        totals = {site: stored.get_tensor(site) for site in stored.keys()}  # noqa: SIM118 - no mapping
    change(facts, totals)
    file.write_bytes(save(totals, {name: json.dumps(value) for name, value in facts.items()}))


FORGED = {
    "sketches of another size": lambda _, totals: totals.update({"site-1": np.zeros(7)}),
    "a sketch that is no number": lambda _, totals: totals.update({"site-1": np.full(4096, np.nan)}),
    "a site without a sketch": lambda _, totals: totals.pop("site-1"),
    "a share that multiplies": lambda facts, _: facts.update(shares={"site-1": 50.0}),
    "a share that turns around": lambda facts, _: facts.update(shares={"site-1": -1.0}),
    "a share without end": lambda facts, _: facts.update(shares={"site-1": float("inf")}),
    "no shares": lambda facts, _: facts.update(shares=3),
    "norms of nothing": lambda facts, _: facts.update(norms=[float("nan"), 2]),
    "rounds that are no number": lambda facts, _: facts["courses"].update({"site-1": [1.0, 1.0, "many"]}),
    "a fact too few": lambda facts, _: facts["courses"].update({"site-1": [1.0, 1.0]}),
}


@pytest.mark.parametrize("how", FORGED)
def test_what_no_round_can_have_written_is_begun_anew(crowd, tmp_path, caplog, how):
    go_on(crowd, range(1, 4))
    rewritten(tmp_path / FOLDER / "round-000003.safetensors", FORGED[how])
    again = Crowd(tmp_path, make_experiment())
    again.begin(3)
    assert "compared anew" in caplog.text
    assert again.share("site-1") == 1.0 and again.factor(1e9, 4) == 1.0 and go_on(again, [4]).persistence == {}


def test_an_undone_round_is_not_remembered(crowd):
    go_on(crowd, range(1, 4))
    for site, update in updates(4, SITES).items():
        crowd.add(site, update, 1000.0, 1.0)
    crowd.forget()
    assert crowd.take_in(4).persistence == {}
    norms = [float(np.linalg.norm(each)) for each in updates(3).values()]
    assert crowd.factor(1e6, 5) == pytest.approx(MAX_NORM_RATIO * np.median(norms) / 1e6, rel=1e-5)


def test_an_update_is_shortened_to_the_sites_of_the_round_before(crowd):
    assert crowd.factor(1e6, 1) == 1.0
    for number, site in enumerate(SITES):
        crowd.add(site, np.ones(SIZE, np.float32), 2.0 if number < 4 else 500.0, 1.0)
    crowd.take_in(1)
    assert crowd.factor(2.4, 2) == 1.0 and crowd.factor(10.0, 2) == pytest.approx(MAX_NORM_RATIO * 2.0 / 10, rel=1e-5)


def test_the_bound_rises_with_a_warm_up_of_the_run(tmp_path):
    experiment = make_experiment(rounds=3, warmup="run", local_steps=4)
    experiment = experiment.model_copy(update={"optim": experiment.optim.model_copy(update={"warmup_steps": 8})})
    crowd = Crowd(tmp_path, experiment)
    crowd.begin(0)
    for site in SITES:
        crowd.add(site, np.ones(SIZE, np.float32), 2.0, 1.0)
    crowd.take_in(1)
    rise = (5 + 6 + 7 + 8) / (1 + 2 + 3 + 4)
    assert crowd.factor(100.0, 2) == pytest.approx(MAX_NORM_RATIO * 2.0 * rise / 100, rel=1e-5)


def test_too_few_sites_bound_nobody(crowd):
    for site in SITES[: LEAST_SITES - 1]:
        crowd.add(site, np.ones(SIZE, np.float32), 2.0, 1.0)
    crowd.take_in(1)
    assert crowd.factor(100.0, 2) == 1.0


HIDDEN = [
    {"secure": True},
    {"central_noise_multiplier": 0.7, "max_update_norm": 3.0, "update_norm_action": "clip", "sites_per_round": 3},
    {"max_norm_ratio": 0, "max_persistence": 0},
]


@pytest.mark.parametrize("federation", HIDDEN)
def test_where_nobody_may_look_nothing_is_kept(tmp_path, federation):
    crowd = Crowd(tmp_path, make_experiment(**federation))
    crowd.begin(0)
    assert not crowd.is_on and go_on(crowd, range(1, 5), ["site-4"]).persistence == {}
    assert crowd.factor(1e9, 5) == 1.0 and list(tmp_path.iterdir()) == []


def sent_by(site, length, *, run, server_round, size=0.0):
    """As `trained` of the tiny federation makes it; `size` of its length goes one way."""
    random = np.random.default_rng(derive_seed(7, site, run, server_round))
    noise = random.normal(scale=0.1, size=length)
    way = np.random.default_rng(99).normal(scale=0.1, size=length)
    return ((1 - size**2) ** 0.5 * noise + size * way).astype(np.float32)


def pushing(name, size=0.8):
    """A site whose updates are no longer than the others' and share one way."""

    def answer(content, _asked):
        request = TrainRequest.from_record(content)
        facts = {"run": request.header.run, "server_round": request.header.server_round}
        return reply(request, sent_by(name, len(request.weights), size=size, **facts))

    return answer


def test_rounds_name_who_pushes_count_it_less_and_in_full_when_the_operator_trusts_it(tmp_path):
    experiment = make_experiment(rounds=8)
    home = make_home(tmp_path, experiment, num_sites=7)
    grid = FakeGrid(honest_sites(7, site_6=pushing("site-6")))
    run_rounds(home, grid, experiment)
    records = rounds_of(home)
    (named,) = [record for record in records if "site-6" in record.get("named", [])]
    assert named["round"] == LEAST_ROUNDS and named["persistence"]["site"] == "site-6"
    doubt = named["doubted"]["site-6"]
    assert doubt["round"] == LEAST_ROUNDS and 0.3 < doubt["share"] < 0.9 and doubt["persistence"] > 0.1
    for before, record in itertools.pairwise(records):
        shares = {entry["site"]: entry["share"] for entry in record["answered"] if "share" in entry}
        assert shares == {site: each["share"] for site, each in before.get("doubted", {}).items()}
    trust(home / "runs" / "run", "site-6")
    longer = make_experiment(rounds=10)
    (home / "runs" / "run" / "experiment.toml").write_text(longer.to_toml())
    run_rounds(home, grid, longer)
    for record in rounds_of(home)[8:]:
        assert "site-6" not in record.get("doubted", {})
        assert not any("share" in entry for entry in record["answered"] if entry["site"] == "site-6")


def test_a_share_is_what_the_sum_has_of_an_update(tmp_path):
    experiment = make_experiment(rounds=5, max_norm_ratio=0)
    home = make_home(tmp_path, experiment, num_sites=6)
    run_rounds(home, FakeGrid(honest_sites(6, site_2=pushing("site-2", 0.95))), experiment)
    last = rounds_of(home)[-1]
    shares = {entry["site"]: entry.get("share", 1.0) for entry in last["answered"]}
    assert shares["site-2"] < 0.5
    before, after = (weights_of(home, number) for number in (4, 5))
    moved = np.concatenate([(after[name] - before[name]).ravel() for name in sorted(after)])
    sent = np.zeros(len(moved))
    for site, share in shares.items():
        content = {"run": "run", "server_round": 5}
        sent += share * sent_by(site, len(moved), size=0.95 if site == "site-2" else 0.0, **content) / 6
    assert moved == pytest.approx(sent, abs=1e-6)


def test_a_run_killed_at_any_round_names_the_same_site_in_the_same_round(tmp_path, monkeypatch):
    from server.federation.updates import global_model

    class Killed(BaseException):
        pass

    experiment = make_experiment(rounds=6)
    grid = lambda: FakeGrid(honest_sites(6, site_2=pushing("site-2", 0.95)))  # noqa: E731
    save, ends = global_model.save_checkpoint, []
    for doomed in (0, 3, 4):
        home = make_home(tmp_path / str(doomed), experiment, num_sites=6)
        folder = home / "runs" / "run" / FOLDER
        folder.mkdir(mode=0o700)
        (folder / KEY_FILE).write_bytes(bytes(32))

        def die(place, groups, meta, doomed=doomed):
            if meta["round"] == doomed and "ema" in groups:
                raise Killed
            return save(place, groups, meta)

        monkeypatch.setattr(global_model, "save_checkpoint", die)
        if doomed:
            with pytest.raises(Killed):
                run_rounds(home, grid(), experiment)
        monkeypatch.setattr(global_model, "save_checkpoint", save)
        run_rounds(home, grid(), experiment)
        ends.append((weights_of(home, 6), [record.get("named") for record in rounds_of(home)]))
    assert sum("site-2" in each for each in ends[0][1] if each) == 1
    for weights, named in itertools.islice(ends, 1, None):
        assert named == ends[0][1] and same(weights, ends[0][0])
    assert events_of(home, "end")[-1]["status"] == "completed"
