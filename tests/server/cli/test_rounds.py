import contextlib
import json
import shutil
import socket
import sys

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from deploy.coordinator import Coordinator, create_coordinator, read_settings
from deploy.identity.site_identity import create_identity
from deploy.processes.process import free_ports
from server.cli import main as cli
from server.federation import status
from server.federation.acceptance.trust import trusted
from server.federation.fleet import superlink
from server.federation.fleet.registry import Registry
from server.federation.fleet.superlink_types import ControlError
from server.federation.resubmission import Wanted
from shared.storage.runlog import OUTCOMES, RunLog
from tests.server.fake_federation import honest_sites, make_experiment, make_home, run_rounds
from tests.server.fake_grid import FakeGrid
from tests.server.federation.test_resubmission import FakeControl
from tests.signing import public_of


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory):
    """A coordinator's folder with a port where nothing listens."""
    home = tmp_path_factory.mktemp("deployed") / "coordinator"
    port, health = free_ports(2)
    create_coordinator(home, Coordinator(1, f"127.0.0.1:{port}", "127.0.0.1", port, health, False, False), [])
    return home


@pytest.fixture
def run_home(tmp_path, coordinator, monkeypatch):
    """The same folder with a run in it, and a SuperLink that the test plays."""
    home = make_home(tmp_path, make_experiment())
    for name in ("coordinator.toml", "superexec.secret"):
        (home / name).write_bytes((coordinator / name).read_bytes())
        (home / name).chmod(0o600)
    shutil.rmtree(home / "pki")
    (home / "pki").symlink_to(coordinator / "pki")
    control = FakeControl()
    monkeypatch.setattr(status, "connect", lambda *_: contextlib.nullcontext(control))
    Wanted(home).submit(control, "run")
    return home, control


def call(monkeypatch, capsys, *arguments):
    """Exit code, standard output and standard error of a command."""
    monkeypatch.setattr(sys, "argv", ["maskfed-server", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
        raise SystemExit(0)
    captured = capsys.readouterr()
    return caught.value.code or 0, captured.out, captured.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["finetune"], "needs an experiment file"),
        (["finetune", "nothing.toml", "--init", "x"], "nothing.toml"),
        (["finetune", "--resume", "nothing"], "'nothing' is unknown"),
        (["status", "nothing"], "'nothing' is unknown"),
        (["sites", "remove", "nobody"], "'nobody' is not registered"),
        (["simulate", "nothing.toml"], "nothing.toml"),
        (["simulate", "nothing.toml", "--by", "weight"], "person or dirichlet"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(coordinator, monkeypatch, capsys, tmp_path, arguments, words):
    monkeypatch.chdir(tmp_path)
    home = [] if arguments[0] == "simulate" else ["--home", coordinator]
    code, _out, err = call(monkeypatch, capsys, *arguments, *home)
    assert code == 2
    assert words in err
    assert err.startswith("error: ")
    assert len(err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_coordinators_is_exit_code_2(tmp_path, monkeypatch, capsys):
    code, _out, err = call(monkeypatch, capsys, "status", "--home", tmp_path)
    assert code == 2
    assert "maskfed-server init" in err


def test_a_superlink_that_is_away_is_exit_code_1(coordinator, monkeypatch, capsys):
    code, _out, err = call(monkeypatch, capsys, "stop", "run", "--home", coordinator)
    assert (code, err.count("\n")) in ((1, 1), (2, 1))


def test_a_coordinator_without_runs_says_so(coordinator, monkeypatch, capsys):
    assert call(monkeypatch, capsys, "status", "--home", coordinator)[:2] == (
        0,
        "no runs yet: `maskfed-server finetune` starts one\n",
    )
    assert json.loads(call(monkeypatch, capsys, "status", "--json", "--home", coordinator)[1]) == []


def test_sites_are_listed_as_json(coordinator, monkeypatch, capsys):
    Registry(coordinator / "sites.json").add("site-a", "ecdsa-sha2-nistp384 AAAA", public_of("site-a"))
    code, out, _err = call(monkeypatch, capsys, "sites", "list", "--json", "--home", coordinator)
    assert code == 0
    assert ("site-a", "unknown (no SuperLink)") in [(site["alias"], site["status"]) for site in json.loads(out)]


def test_sites_are_removed_with_an_answer_in_json(coordinator, monkeypatch, capsys):
    public = ec.generate_private_key(ec.SECP384R1()).public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    Registry(coordinator / "sites.json").add("leaves", public.decode(), public_of("leaves"))
    code, out, _err = call(monkeypatch, capsys, "sites", "remove", "leaves", "--json", "--home", coordinator)
    assert (code, json.loads(out)) == (0, {"alias": "leaves", "removed": True})


def test_a_site_that_a_run_doubts_is_trusted_once_and_no_other(run_home, monkeypatch, capsys):
    home, _control = run_home
    lists = {state: [] for state in OUTCOMES}
    doubted = {"site-1": {"round": 3, "persistence": 0.8, "share": 0.5}}
    RunLog(home / "runs" / "run" / "metrics.jsonl").write("round", round=3, doubted=doubted, **lists)
    for words, said in (
        (("site-0", "--run", "run"), "run run does not doubt 'site-0': it doubts site-1"),
        (("site-1", "--run", "other"), "'other' is unknown"),
        (("site-1", "--run", "../run"), "run name '../run'"),
    ):
        code, _out, err = call(monkeypatch, capsys, "sites", "trust", *words, "--home", home)
        assert (code, err.count("\n")) == (2, 1) and said in err
    assert trusted(home / "runs" / "run") == set()
    words = ("sites", "trust", "site-1", "--run", "run", "--home", home, "--json")
    code, out, _err = call(monkeypatch, capsys, *words)
    assert (code, json.loads(out)) == (0, {"alias": "site-1", "run": "run", "trusted": True})
    assert trusted(home / "runs" / "run") == {"site-1"}
    assert call(monkeypatch, capsys, *words)[0] == 2
    events = [json.loads(line)["event"] for line in (home / "logs" / "admissions.log").read_text().splitlines()]
    refused = "trusted in run refused"
    assert events == [refused, "trusted in other refused", "trusted in run", refused]


def test_following_a_completed_run_is_exit_code_0_and_json(run_home, monkeypatch, capsys):
    home, control = run_home
    run_rounds(home, FakeGrid(honest_sites()), make_experiment())
    control.states[1] = "finished:completed"
    assert status.follow(home, "run", as_json=True) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["status"], summary["rounds_done"]) == ("completed", 2)


def test_following_a_failed_run_is_exit_code_1_whatever_flower_says(run_home, monkeypatch, capsys):
    home, control = run_home
    RunLog(home / "runs" / "run" / "metrics.jsonl").write("end", status="failed", reason="all refused", is_final=True)
    control.states[1] = "finished:completed"
    assert status.follow(home, "run") == 1
    assert "all refused" in capsys.readouterr().out
    code, out, _err = call(monkeypatch, capsys, "status", "run", "--json", "--home", home)
    assert code == 1
    assert json.loads(out)["status"] == "failed"


def test_a_follower_does_not_wait_for_ever_for_a_superlink_that_is_away(run_home, monkeypatch):
    home, control = run_home

    def away():
        raise ControlError("away")

    monkeypatch.setattr(control, "nodes", away)
    monkeypatch.setattr(status, "AWAY_SECONDS", 0.1)
    monkeypatch.setattr(status, "POLL_SECONDS", 0.05)
    with pytest.raises(ControlError, match="run run continues"):
        status.follow(home, "run")


def enrolment(folder, alias):
    return create_identity(folder / alias, alias)


def test_sites_that_cannot_all_be_added_are_not_added_at_all(coordinator, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    before = Registry(coordinator / "sites.json").sites()
    first, second = enrolment(tmp_path, "pair-a"), enrolment(tmp_path, "pair-b")
    (tmp_path / "pair-b.join.json").write_text("in the way")
    bad = [[first, first], [first, second], [first, "maskfed-enrol-2:garbage"]]
    for requests in bad:
        code, _out, err = call(monkeypatch, capsys, "sites", "add", *requests, "--home", coordinator)
        assert (code, err.count("\n")) == (2, 1)
    assert Registry(coordinator / "sites.json").sites() == before
    assert not (tmp_path / "pair-a.join.json").exists()
    lines = (coordinator / "logs" / "admissions.log").read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines][-len(bad) :] == ["added refused"] * len(bad)


def test_a_bundle_that_cannot_be_written_leaves_no_site_behind(coordinator, monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("no folder")
    line = enrolment(tmp_path, "unlucky")
    arguments = ("sites", "add", line, "--home", coordinator, "--bundle")
    assert call(monkeypatch, capsys, *arguments, tmp_path / "file" / "x.json")[0] == 2
    assert call(monkeypatch, capsys, *arguments, tmp_path / "x.json")[0] == 0


def test_status_tells_what_files_say_while_a_superlink_takes_calls_and_answers_none(run_home, monkeypatch, capsys):
    """As after SIGSTOP: the kernel takes the connection. How long is waited is a constant, which is short here."""
    home, _control = run_home
    monkeypatch.setattr(status, "HEARD_SECONDS", 0.01)
    asked = []

    def connect(folder, *seconds):
        asked.append(seconds)
        return superlink.connect(folder, *seconds)

    monkeypatch.setattr(status, "connect", connect)
    with socket.create_server(("127.0.0.1", read_settings(home).port)):
        code, out, _err = call(monkeypatch, capsys, "status", "--home", home, "--json")
    assert code == 0
    assert [run["status"] for run in json.loads(out)] == ["running"]
    assert asked == [(0.01,)]
