"""The real thing, small: TLS, node authentication, process isolation, own keys, two sites, two rounds.

One federation for all tests, which follow each other: each is a chapter of its life.
"""

import contextlib
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from benchmarks.local import LocalFederation, command, make_experiment, program_of, random_checkpoint, tiny_experiment
from client.cli import main as client_cli
from client.data.dataset import open_dataset
from client.home import Home
from client.limits import AuditPolicy
from client.records.data_registry import REGISTRY_VARIABLE
from client.settings import load_settings, save_settings
from deploy.coordinator import is_loopback
from server.cli import main as server_cli
from shared.evaluation.feature_statistics import load_statistics, statistics_of
from shared.evaluation.networks import load_extractor
from shared.storage.checkpoint import load_group
from shared.storage.runlog import read_metrics

EXPERIMENT = (
    # One patch is the whole image: an audit looks at it hundreds of times.
    tiny_experiment(image_size=8, rounds=2, local_steps=3, round_deadline_seconds=240).replace(
        "patch_size = 4", "patch_size = 8"
    )
    + '[evaluation]\nsampler = "dpm++"\nsteps = 4\n'
)
PROGRAMS = {"maskfed-client": client_cli, "maskfed-server": server_cli}
# Flower's bundler calls pathspec by a name that is deprecated there.
pytestmark = [pytest.mark.timeout(400), pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")]


class Federation(LocalFederation):
    """Whose commands, apart from those that stay, run in this process: nine programs would load for half a minute."""

    def call(self, *arguments: str) -> str:
        """Standard output of a command that must succeed."""
        out, err = io.StringIO(), io.StringIO()
        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            patch.setattr(sys, "argv", list(arguments))
            try:
                PROGRAMS[arguments[0]].main()
            except SystemExit as ended:
                assert not ended.code, f"{arguments}: {out.getvalue()}{err.getvalue()}"
        return out.getvalue()


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """Two sites and a coordinator, started."""
    made = Federation(tmp_path_factory.mktemp("federation"), num_sites=2, image_size=8, num_images=112)
    try:
        made.set_up()
        allow_questions(made)
        made.start()
        yield made
    finally:
        made.stop()


@pytest.fixture(autouse=True)
def own_registry(local: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where this machine keeps which photos were ever used: that of the federation, in every test."""
    monkeypatch.setenv(REGISTRY_VARIABLE, str(local.root / "registry"))


@pytest.fixture(scope="module")
def init(local: Federation) -> Path:
    """The checkpoint that the run starts from, and audits compare with."""
    return random_checkpoint(local.root / "init", make_experiment(EXPERIMENT))


@pytest.fixture(scope="module")
def following(local: Federation, init: Path) -> Iterator[subprocess.Popen[str]]:
    """The command that follows the run, whose superexec is killed after round 1.

    The ServerApp dies with it, and Flower notices only after most of a minute; the tests up to the one that waits for
    the end of the run take place in that time.
    """
    file = local.root / "tiny.toml"
    file.write_text(EXPERIMENT)
    arguments = ("--init", str(init), "--home", str(local.home), "--run", "tiny", "--json")
    with subprocess.Popen(
        command("maskfed-server", "finetune", str(file), *arguments), stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            kill_the_superexec_after_round_1(local)
            yield process
        finally:
            process.kill()


def test_private_files_are_private_and_no_door_is_open(local: Federation):
    check_private_files(local)
    check_doors_are_shut(local)


@pytest.mark.usefixtures("following")
def test_what_sites_release_adds_up_while_a_run_waits_to_go_on(local: Federation):
    check_federated_reference(local)


@pytest.mark.usefixtures("following")
def test_one_site_audits_the_model_so_far_and_the_other_does_not_want_to(local: Federation, init: Path):
    check_audits(local, init)


def test_a_run_whose_superexec_was_killed_goes_on_from_its_checkpoint(
    local: Federation, following: subprocess.Popen[str]
):
    output, _ = following.communicate(timeout=300)
    assert following.returncode == 0, output
    assert json.loads(output)["status"] == "completed"
    check_rounds(local)
    check_ledgers(local)


def test_each_site_has_a_parent_that_processes_of_messages_are_forked_from(local: Federation):
    """Below its superexec; on a busy machine the first message may have gone without."""
    superexecs = [
        child
        for name in ("site-0", "site-1")
        for child in psutil.Process(local.daemons[name].pid).children()
        if program_of(child) == "flower-superexec"
    ]
    assert len(superexecs) == 2
    for superexec in superexecs:
        assert "maskfed-warm" in {program_of(each) for each in superexec.children(recursive=True)}


def test_nothing_is_left_when_all_have_stopped(local: Federation):
    family = [process for group in local.processes().values() for process in group]
    assert local.stop() == 0
    assert [process for process in family if process.is_running() and process.status() != "zombie"] == []


def kill_the_superexec_after_round_1(local: LocalFederation) -> None:
    """SIGKILL in round 2, and the ServerApp dies with it: the run must go on from the checkpoint of round 1, by itself.

    Killing the ServerApp alone ends the same way, but Flower notices that only after most of a minute.
    """
    deadline = time.monotonic() + 240
    while not (local.home / "runs" / "tiny" / "checkpoints" / "round-000001").exists():
        assert time.monotonic() < deadline, "round 1 did not end in time"
        time.sleep(0.1)
    for process in psutil.Process(local.daemons["coordinator"].pid).children():
        if program_of(process) == "flower-superexec":
            os.kill(process.pid, signal.SIGKILL)


def check_rounds(local: LocalFederation) -> None:
    rounds = [
        event for event in read_metrics(local.home / "runs" / "tiny" / "metrics.jsonl") if event["kind"] == "round"
    ]
    assert [event["round"] for event in rounds] == [1, 2]
    for event in rounds:
        assert {reply["site"] for reply in event["answered"]} == {"site-0", "site-1"}, event
        assert event["weights_changed"], event
    checkpoints = local.home / "runs" / "tiny" / "checkpoints"
    weights = [load_group(checkpoints / f"round-{number:06d}", "model") for number in range(3)]
    for before, after in itertools.pairwise(weights):
        assert set(before) == set(after)
        assert any(not np.array_equal(before[name], after[name]) for name in before)


def check_ledgers(local: LocalFederation) -> None:
    """A round that was asked twice because the coordinator died is charged once."""
    for index in range(2):
        said = local.call("maskfed-client", "ledger", "verify", "--home", str(local.site(index)))
        assert "error" not in said.lower()
        entries = [json.loads(line) for line in (local.site(index) / "ledger.jsonl").read_text().splitlines()]
        charged = [entry["fields"] for entry in entries if entry["kind"] == "reserve"]
        # What it released for statistics and for an audit is charged, too, and says so.
        assert [each["run"] for each in charged if not each["remarks"]] == ["tiny", "tiny"]


def allow_questions(local: LocalFederation) -> None:
    """Sites that release exact statistics, the first one also verdicts, and hold half of their images out for these."""
    for index in range(2):
        home = Home(local.site(index))
        settings = load_settings(home)
        allowed = {"tasks": ("train", "statistics", "audit"), "extractors": ("random-inception",)}
        audit = AuditPolicy(max_per_run=1 - index, noise_multiplier=0.5, max_auc=0.51, num_images=10, control_steps=10)
        limits = {"min_images_statistics": 2, "audit": audit, "epsilon_cap": 50.0}
        policy = settings.policy.model_copy(update={**allowed, **limits})
        save_settings(home, settings.model_copy(update={"policy": policy, "held_out_ratio": 0.5}))
        local.call("maskfed-client", "data", "scan", "--new", "--home", str(home.path))


def check_federated_reference(local: LocalFederation) -> None:
    """What the sites release adds up to the statistics of all their training images, and the result says what it is."""
    run = local.home / "runs" / "tiny"
    arguments = ("--reference", "federated", "--home", str(local.home), "--extractor", "random-inception", "--num", "8")
    local.call("maskfed-server", "evaluate", str(run), *arguments, "--name", "pooled")
    extractor = load_extractor("random-inception")
    sites = [open_dataset(Home(local.site(index)), 8) for index in range(2)]
    union = statistics_of(np.concatenate([extractor(data.images.batch(data.train)) for data in sites]), extractor.space)
    (file,) = (local.home / "runs").glob("statistics-*/pooled.safetensors")
    pooled = load_statistics(file)
    np.testing.assert_allclose(pooled.outer_DD, union.outer_DD, rtol=1e-6)
    np.testing.assert_allclose(pooled.total_D, union.total_D, rtol=1e-6)
    result = json.loads((run / "evaluation" / "pooled" / "result.json").read_text())
    assert result["reference"]["n"] == union.n
    assert (result["reference"]["release"], result["reference"]["sites"]) == ("exact", "site-0+site-1")


def check_audits(local: LocalFederation, init: Path) -> None:
    """A site attacks the model that travels to it, and only noisy counts come back; the other site does not want to."""
    run = local.home / "runs" / "tiny"
    arguments = ("--reference", str(init), "--home", str(local.home))
    said = local.call("maskfed-server", "audit", str(run), *arguments)
    assert "site-1: refused: too_many_rounds" in said
    verdicts = [json.loads(file.read_text()) for file in (run / "audits").iterdir()]
    assert {(each["site"], each["audit"]) for each in verdicts} == {
        ("site-0", "membership"),
        ("site-0", "memorisation"),
    }
    assert all(each["figures"]["noise_multiplier"] == 0.5 for each in verdicts)
    assert all(each["passed"] for each in verdicts if each["audit"] == "memorisation")


def check_private_files(local: LocalFederation) -> None:
    names = ("node.key", "site.secret", "tls/srv.key", "site.toml", "ledger.jsonl", "data.key")
    private = [local.site(index) / name for index in range(2) for name in names]
    private += [local.home / "pki" / "server.key", local.home / "superexec.secret", local.home / "ca" / "ca.key"]
    for path in private:
        if path.exists():
            assert path.stat().st_mode & 0o077 == 0, path


def check_doors_are_shut(local: LocalFederation) -> None:
    """Whatever listens, listens on loopback only: Flower's own ports trust whoever reaches them."""
    for process in (p for group in local.processes().values() for p in group):
        for connection in process.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN:
                assert is_loopback(connection.laddr.ip), process.name()
