"""What client-level DP releases, and what it says it spent, over whole runs."""

import json
import shutil

import numpy as np
import pytest

from server.federation.client_level.mechanism import KEY_BYTES, central_epsilon
from server.federation.client_level.release_ledger import LEDGER_FILE, CentralLedger, NoiseKeys
from server.federation.fleet.registry import Registry
from server.federation.rounds.selection import choose
from server.federation.updates import global_model
from shared.errors import InputError
from shared.messages.training import ReplyHeader, TrainReply, TrainRequest
from tests.full_disk import room_for
from tests.server.fake_federation import (
    honest_sites,
    make_experiment,
    make_home,
    rounds_of,
    run_rounds,
    same,
    weights_of,
)
from tests.server.fake_grid import FakeGrid

CENTRAL = {"central_noise_multiplier": 0.7, "max_update_norm": 3.0, "update_norm_action": "clip", "sites_per_round": 3}
INPUTS = "ab" * 32


def refusal(content, _asked):
    digest = TrainRequest.from_record(content).digest
    return TrainReply(ReplyHeader(request_digest=digest, status="refused", refusal="policy", reason="no")).to_record()


def fresh(folder, **federation):
    experiment = make_experiment(**CENTRAL | federation)
    return make_home(folder, experiment), experiment


def test_a_run_reports_epsilon_and_no_norm_of_a_site(tmp_path):
    home, experiment = fresh(tmp_path)
    run_rounds(home, FakeGrid(honest_sites()), experiment)
    record = rounds_of(home)[1]
    assert record["central_epsilon"] == central_epsilon([0.7, 0.7], 1e-5)
    assert (record["central_unit"], record["central_releases"]) == ("site", 2)
    assert not any("norm" in entry for entry in record["answered"])
    for file in (home / LEDGER_FILE, home / "runs" / "run" / "central-noise.json"):
        assert file.stat().st_mode & 0o777 == 0o600


def spend(home, number):
    ledger = CentralLedger(home)
    for server_round in range(1, number + 1):
        ledger.charge("run", server_round, 0.5 + server_round, INPUTS)
    return ledger


@pytest.mark.parametrize("change", ["removed", "edited", "put in", "first removed"])
def test_a_line_that_is_changed_removed_or_put_in_stops_the_next_release(tmp_path, change):
    ledger = spend(tmp_path, 4)
    lines = ledger.path.read_text().splitlines(keepends=True)
    match change:
        case "removed":
            del lines[1]
        case "first removed":
            del lines[0]
        case "edited":
            lines[1] = lines[1].replace("2.5", "99.5")
        case "put in":
            lines.insert(2, lines[0])
    ledger.path.write_text("".join(lines))
    with pytest.raises(InputError, match=r"central-ledger.jsonl is damaged .*does not follow"):
        ledger.releases()
    with pytest.raises(InputError, match="is damaged"):
        ledger.charge("run", 5, 1.0, INPUTS)


def test_lines_of_versions_without_a_chain_are_counted_and_chained_on(tmp_path):
    old = {"time": "2026-01-01T00:00:00+00:00", "run": "old", "server_round": 1, "inputs": INPUTS}
    old["noise_multiplier"] = 2.0
    (tmp_path / LEDGER_FILE).write_text(f"{json.dumps(old)}\n" * 2)
    ledger = spend(tmp_path, 2)
    assert [release.noise_multiplier for release in ledger.releases()] == [2.0, 2.0, 1.5, 2.5]
    lines = ledger.path.read_text().splitlines(keepends=True)
    ledger.path.write_text("".join([lines[0], *lines[2:]]).replace('"old"', '"new"'))
    with pytest.raises(InputError, match="does not follow"):
        ledger.releases()


@pytest.mark.parametrize("cut", [1, 40, -2])
def test_a_line_that_a_crash_cut_off_is_not_counted_and_the_next_one_takes_its_place(tmp_path, cut):
    """The noise of a release is drawn after its line is whole on disk."""
    ledger = spend(tmp_path, 2)
    whole = ledger.path.read_bytes()
    last = whole.splitlines()[-1]
    ledger.path.write_bytes(whole + last[:cut])
    assert len(ledger.releases()) == 2
    ledger.charge("run", 3, 7.0, INPUTS)
    assert [release.noise_multiplier for release in ledger.releases()] == [1.5, 2.5, 7.0]


def test_a_round_with_too_few_replies_or_none_is_released_and_counted(tmp_path):
    home, experiment = fresh(tmp_path, rounds=2, min_replies=3, available_deadline_seconds=0.3)
    sites = honest_sites()
    for site in sites.values():
        site.is_online = False
    run_rounds(home, FakeGrid(sites), experiment)
    first, second = rounds_of(home)
    assert first["weights_changed"] and second["weights_changed"]
    assert first["answered"] == [] and second["central_releases"] == 2
    assert not same(weights_of(home, 0), weights_of(home, 1))
    change = np.concatenate(
        [(weights_of(home, 1)[name] - value).ravel() for name, value in weights_of(home, 0).items()]
    )
    assert change.std() == pytest.approx(0.7 * 3.0 / 3, rel=0.4)


def test_a_round_repeated_with_the_same_replies_repeats_its_bits_and_costs_nothing(tmp_path, monkeypatch):
    home, experiment = fresh(tmp_path, rounds=1)
    save, kept = global_model.save_checkpoint, []

    def dies(_folder, groups, _meta):
        kept.append({name: tensor.copy() for name, tensor in groups["model"].items()})
        raise KeyboardInterrupt

    monkeypatch.setattr(global_model, "save_checkpoint", dies)
    with pytest.raises(KeyboardInterrupt):
        run_rounds(home, FakeGrid(honest_sites()), experiment)
    monkeypatch.setattr(global_model, "save_checkpoint", save)
    run_rounds(home, FakeGrid(honest_sites()), experiment)
    assert same(weights_of(home, 1), kept[0])
    assert rounds_of(home)[0]["central_releases"] == 1


def test_noise_is_new_for_other_replies_another_constant_and_a_run_started_again(tmp_path):
    folder = tmp_path / "runs" / "run"
    folder.mkdir(parents=True)
    ledger = CentralLedger(tmp_path)
    keys = NoiseKeys(ledger, "run", folder)
    first = keys.key(1, 0.7, INPUTS)
    assert keys.key(1, 0.7, INPUTS) == first
    assert NoiseKeys(ledger, "run", folder).key(1, 0.7, INPUTS) == first
    assert len(ledger.releases()) == 1
    other = keys.key(1, 0.7, "cd" * 32)
    back = keys.key(1, 0.7, INPUTS)
    shutil.rmtree(folder)
    folder.mkdir()
    again = keys.key(1, 0.7, INPUTS)
    assert len({first, other, back, again}) == 4
    assert [release.noise_multiplier for release in ledger.releases()] == [0.7] * 4


def test_runs_of_one_home_add_up(tmp_path):
    home, experiment = fresh(tmp_path)
    run_rounds(home, FakeGrid(honest_sites()), experiment)
    other = make_experiment(**CENTRAL | {"central_noise_multiplier": 2.0, "rounds": 1})
    shutil.copytree(home / "runs" / "run", home / "runs" / "second")
    shutil.rmtree(home / "runs" / "second" / "checkpoints" / "round-000001")
    shutil.rmtree(home / "runs" / "second" / "checkpoints" / "round-000002")
    (home / "runs" / "second" / "experiment.toml").write_text(other.to_toml())
    run_rounds(home, FakeGrid(honest_sites()), other, run="second")
    assert rounds_of(home, "second")[-1]["central_epsilon"] == central_epsilon([0.7, 0.7, 2.0], 1e-5)


def test_a_damaged_ledger_stops_the_run(tmp_path):
    home, experiment = fresh(tmp_path)
    (home / LEDGER_FILE).write_text('{"run": "run"}\n')
    with pytest.raises(InputError, match="restore the newest copy"):
        run_rounds(home, FakeGrid(honest_sites()), experiment)
    assert rounds_of(home) == []


def test_a_charge_is_on_disk_before_the_noise_is_used(tmp_path, monkeypatch):
    home, experiment = fresh(tmp_path)
    seen = []

    def look(key, *_):
        seen.append((json.loads((home / "runs" / "run" / "central-noise.json").read_text())["key"] == key.hex(),
                     len(CentralLedger(home).releases())))  # fmt: skip
        raise KeyboardInterrupt

    monkeypatch.setattr("server.federation.updates.step.grid_noise", look)
    with pytest.raises(KeyboardInterrupt):
        run_rounds(home, FakeGrid(honest_sites()), experiment)
    assert seen == [(True, 1)]


def test_one_site_more_or_less_changes_nothing_for_any_other():
    experiment = make_experiment(**CENTRAL | {"sites_fraction": 0.4})
    everybody = [f"site-{index}" for index in range(40)]
    sizes = set()
    for server_round in range(1, 30):
        chosen = set(choose(experiment, server_round, everybody, everybody))
        without = [site for site in everybody if site != "site-7"]
        assert set(choose(experiment, server_round, without, without)) == chosen - {"site-7"}
        assert set(choose(experiment, server_round, everybody, without)) == chosen - {"site-7"}
        sizes.add(len(chosen))
    assert len(sizes) > 1
    assert sum(sizes) / len(sizes) == pytest.approx(16, abs=5)


def test_all_are_asked_unless_a_probability_is_given(tmp_path):
    home, experiment = fresh(tmp_path, rounds=1, sites_per_round=2)
    Registry(home / "sites.json").revoke("site-2")
    run_rounds(home, FakeGrid(honest_sites()), experiment)
    assert [entry["site"] for entry in rounds_of(home)[0]["asked"]] == ["site-0", "site-1"]


def test_a_release_that_a_full_disk_does_not_count_is_not_made(tmp_path):
    """The kernel takes a part of the line and says nothing: nobody may go on as if the release were counted."""
    ledger, run = CentralLedger(tmp_path), tmp_path / "run"
    run.mkdir()
    ledger.charge("run", 1, 0.7, INPUTS)
    size = ledger.path.stat().st_size
    for spare in (0, 30):
        with room_for(size + spare), pytest.raises(OSError, match="too large"):
            NoiseKeys(ledger, "run", run).key(2, 0.7, INPUTS)
        assert not list(run.iterdir())
        assert ledger.path.stat().st_size == size
    NoiseKeys(ledger, "run", run).key(2, 0.7, INPUTS)
    assert len(ledger.path.read_bytes().splitlines()) == 2


def test_all_of_a_noise_key_is_fresh(tmp_path):
    keys = NoiseKeys(CentralLedger(tmp_path), "run", tmp_path)
    one, other = (keys.key(number, 0.7, f"{number:064x}") for number in (1, 2))
    parts = [key[start : start + 8] for key in (one, other) for start in range(0, KEY_BYTES, 8)]
    assert len(one) == len(other) == KEY_BYTES and len(set(parts)) == len(parts)


def test_a_site_that_refuses_is_asked_all_the_same(tmp_path):
    """Who is asked must not follow from what sites said: that would tell more than the noise allows."""
    home, experiment = fresh(tmp_path, rounds=5)
    run_rounds(home, FakeGrid(honest_sites(site_1=refusal)), experiment)
    assert all({"site": "site-1"} in record["asked"] for record in rounds_of(home))
