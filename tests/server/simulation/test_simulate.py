import json
import subprocess
import sys
import tomllib
from dataclasses import replace

import pytest
from rich.console import Console

from client.settings import SiteConfig, load_settings
from client.simulated.virtual_site import home_of
from server.app import enlist_virtual_sites
from server.federation.fleet.registry import Registry
from server.runs.run_directory import RunDir
from server.simulation.simulate import Simulate, prepare, simulate
from server.simulation.simulation_folder import RUN
from server.simulation.virtual_keys import make_keys
from shared.errors import InputError
from shared.storage.checkpoint import load_meta
from shared.storage.runlog import RunLog
from tests.server.fake_federation import make_experiment, make_home

SECURE = ("federation.secure=true", "federation.min_replies=3", "federation.update_norm_action=clip")


@pytest.fixture
def options(tmp_path):
    experiment = make_experiment(min_available=2)
    make_home(tmp_path, experiment)
    file = tmp_path / "tiny.toml"
    file.write_text(experiment.to_toml())
    return Simulate(
        experiment=str(file),
        overrides=("model.image_size=8",),
        init=str(tmp_path / "source"),
        num_sites=2,
        data="synthetic:6",
        skew="person",
        alpha=0.5,
        out=tmp_path / "simulation",
        num_cpus=1,
        cpus_per_site=1,
        gpus_per_site=0.0,
    )


def test_everything_is_checked_before_anything_is_written(options):
    pytest.importorskip("ray")
    for wrong, words in (
        (replace(options, num_sites=1), "above the 1 registered"),
        (replace(options, init="nowhere"), "nowhere"),
        (options, "model.image_size"),
        (replace(options, overrides=(), adversary="lazy:2"), "--adversary"),
        (replace(options, overrides=(), held_out="nowhere"), "--held-out nowhere"),
        (
            replace(options, overrides=SECURE, num_sites=3, adversary="lazy"),
            r"--adversary does not go with federation\.secure",
        ),
    ):
        with pytest.raises(InputError, match=words):
            prepare(wrong)
        assert not options.out.exists()


def test_a_virtual_site_makes_its_home_from_the_template_with_a_secret_that_repeats(options, monkeypatch):
    pytest.importorskip("ray")
    fitting = replace(options, overrides=())
    prepare(fitting)
    assert load_meta(options.out / "runs" / RUN / "checkpoints" / "round-000000").round == 0
    monkeypatch.setenv("MASKFED_SIMULATION", str(options.out))
    home = home_of({"partition-id": 1, "num-partitions": 2})
    settings = load_settings(home)
    assert isinstance(settings, SiteConfig)
    assert settings.alias == "site-1"
    assert settings.policy.release_scalars == ("loss", "seconds")
    key = home.data_key.read_bytes()
    assert home_of({"partition-id": 1}).data_key.read_bytes() == key
    assert home_of({"partition-id": 0}).data_key.read_bytes() != key
    assert tomllib.loads((options.out / "site.toml").read_text())["device"] == "cpu"


def test_the_same_simulation_goes_on_in_its_folder_and_another_is_refused(options, tmp_path):
    pytest.importorskip("ray")
    fitting = replace(options, overrides=())
    prepare(fitting)
    kept = {path: path.stat().st_mtime_ns for path in sorted(options.out.rglob("*"))}
    prepare(replace(fitting, num_cpus=3))
    assert {path: path.stat().st_mtime_ns for path in sorted(options.out.rglob("*"))} == kept
    for changed, key in (
        (replace(fitting, num_sites=3), "sites"),
        (replace(fitting, data="synthetic:7"), "data"),
        (replace(fitting, alpha=0.7), "division"),
        (replace(fitting, overrides=("train.seed=5",)), "experiment"),
        (replace(fitting, adversary="lazy"), "adversary"),
        (replace(fitting, held_out="synthetic:public:9"), "held_out"),
    ):
        with pytest.raises(InputError, match=f"another {key}: name a new one with --out"):
            prepare(changed)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    with pytest.raises(InputError, match="is not empty and holds no simulation"):
        prepare(replace(fitting, out=tmp_path / "full"))


def test_adversaries_and_held_out_images_are_written_where_the_run_and_its_sites_find_them(options):
    pytest.importorskip("ray")
    prepare(replace(options, overrides=(), adversary="stale:1:2", held_out="synthetic:public:9"))
    assert json.loads((options.out / "adversaries.json").read_text()) == {"site-1": {"kind": "stale", "strength": 2.0}}
    assert RunDir(options.out / "runs" / RUN).stored_settings["held_out"] == "synthetic:public:9"


def test_a_complete_simulation_is_shown_and_not_run_again(options):
    pytest.importorskip("ray")
    fitting = replace(options, overrides=())
    prepare(fitting)
    RunLog(options.out / "runs" / RUN / "metrics.jsonl").write("end", status="completed", round=1)
    console = Console(record=True, width=100)
    assert simulate(fitting, console) == 0
    assert "completed" in console.export_text()
    assert not (options.out / "runtime.log").exists()


def test_a_simulation_ends_with_the_command_that_was_killed():
    with subprocess.Popen(["sleep", "60"]) as command:
        words = ("import time", "from server.app import end_with", f"end_with({command.pid})", "print(1, flush=True)")
        text = "; ".join([*words, "time.sleep(60)"])
        with subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE) as worker:
            assert worker.stdout.readline() == b"1\n"
            assert worker.poll() is None
            command.kill()
            assert worker.wait(20) == 1


def test_virtual_nodes_get_the_alias_of_their_partition(tmp_path):
    class Node:
        def __init__(self, node_id, registered_at):
            self.node_id, self.registered_at = node_id, registered_at

    class Grid:
        def __init__(self, first, second):
            self.first, self.second = first, second

        def get_nodes(self):
            return [Node(self.second, "2026-01-01T00:00:00.2"), Node(self.first, "2026-01-01T00:00:00.1")]

    make_keys(tmp_path, 2)
    registry = Registry(tmp_path / "sites.json")
    # The second time is that of a simulation that goes on, whose nodes are new.
    for first, second in ((7, 9), (11, 7)):
        enlist_virtual_sites(Grid(first, second), registry)
        assert [(site.alias, site.node_id) for site in registry.active()] == [("site-0", first), ("site-1", second)]
