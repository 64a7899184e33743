"""Audits by messages: the very handlers of a site behind a stand-in for Flower's grid, verdicts in gate and report."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, RecordDict
from typer.testing import CliRunner

from client.answers.audit_request import answer_audit
from client.answers.verdicts import Verdict
from client.data.dataset import open_dataset, scan
from client.home import Home
from client.limits import AuditPolicy
from client.private_files import write_private
from client.records.ledger import open_ledger
from client.records.spending import Charge
from client.settings import SiteConfig, SitePolicy, save_settings
from server.app import conduct
from server.cli import main as cli
from server.federation.messaging.transport import Timing
from server.release.audit_question import AuditPlan, make_question
from server.release.audit_sites import AUDIT_FILE, ask_audits
from server.release.gate import gather
from server.release.verdict_files import add_verdicts, read_verdict
from server.runs.history import read_run
from server.runs.run_directory import RunDir, create
from shared.data.synthetic import write_folder
from shared.errors import InputError
from shared.experiment.config import parse_experiment
from shared.seeding import Streams
from shared.storage.checkpoint import load_meta, save_checkpoint
from shared.storage.runlog import RunLog, read_metrics
from shared.training.weights import new_model
from tests.server.evaluation.test_federated_reference import Control, federation

QUICK = Timing(poll_seconds=0.05)
EXPERIMENT = parse_experiment("[model]\nimage_size = 16\npatch_size = 8\n")


def save_model(folder, seed, experiment=EXPERIMENT, **place):
    tensors = new_model(experiment, Streams(seed)).state_dict()
    arrays = {key: tensor.numpy() for key, tensor in tensors.items()}
    save_checkpoint(folder, {"ema": arrays}, {"experiment": experiment, **place})


@pytest.fixture
def run(tmp_path) -> RunDir:
    """A run of one round, in which site0 and site1 took part, and its public start."""
    made = create(tmp_path / "coordinator" / "runs" / "faces", EXPERIMENT)
    answered = [{"site": "site0"}, {"site": "site1"}]
    RunLog(made.metrics).write("round", round=1, asked=answered, answered=answered)
    save_model(made.round_checkpoint(1), 1, round=1)
    save_model(tmp_path / "public", 0, step=5)
    return made


@pytest.fixture
def plan(tmp_path) -> AuditPlan:
    return AuditPlan((tmp_path / "public",))


FACES: list[Path] = []
"""Folders of three sites, drawn once."""


@pytest.fixture(scope="module", autouse=True)
def faces(tmp_path_factory) -> None:
    FACES[:] = [tmp_path_factory.mktemp(f"faces{number}") for number in range(3)]
    for number, folder in enumerate(FACES):
        write_folder(folder, 240, 16, 1, site=f"site{number}", images_per_person=1)


def make_site(tmp_path, number: int, **policy) -> Home:
    home = Home(tmp_path / f"site{number}")
    audit = AuditPolicy(max_per_run=1, noise_multiplier=1.0, max_auc=0.55)
    allowed = {
        "tasks": ("audit",), "experiments": "any", "audit": audit, "max_rounds_per_day": 9, "epsilon_cap": 8.0,
    }  # fmt: skip
    settings = SiteConfig(
        alias=f"site{number}",
        address="127.0.0.1:1",
        data=str(FACES[number]),
        image_size=16,
        held_out_ratio=0.5,
        head_file=str(tmp_path / "heads" / f"{number}.json"),
        device="cpu",
        policy=SitePolicy(**{**allowed, **policy}),
    )
    save_settings(home, settings)
    # A drawn key would draw another split in each run, and in some of them too few images would be held out.
    write_private(home.data_key, bytes(32))
    scan(home, settings)
    data = open_dataset(home, 16)
    charge = Charge(
        dataset_id=data.dataset_id, fingerprint=data.fingerprint, task="train", run="faces", server_round=1,
        request_digest="0" * 64, plan_digest="0" * 64, mechanism="gaussian", noise_multiplier=30.0, sample_rate=1.0,
        steps=1,
    )  # fmt: skip
    with open_ledger(home.ledger, Path(settings.head_file)) as ledger:
        entry, _ = ledger.reserve(charge, cap=8.0, delta=1e-5, epsilon_of=lambda *_: 1.0)
        ledger.commit(entry)
    return home


@pytest.fixture
def outcome(monkeypatch):
    """What the sites' audits find; the models reach them all the same."""
    found = {"passed": True}

    def counted_verdicts(site, subject, *_):
        facts = {"site": site, "checkpoint": subject.checkpoint, "checkpoint_digest": subject.digest}
        reason = "" if found["passed"] else "generated images are copies of training images"
        return [
            Verdict(audit="membership", passed=True, reason="", figures={"auc": 0.51}, **facts),
            Verdict(audit="memorisation", passed=found["passed"], reason=reason, figures={"copied": 0.0}, **facts),
        ]

    monkeypatch.setattr("client.answers.audit_counts.counted_verdicts", counted_verdicts)
    return found


def ask(run, plan, homes, monkeypatch, answers=()):
    """`ask_audits` with the ServerApp's part run at once in place of a submission."""
    handlers = [*(lambda content, _, place=place: answer_audit(content, place) for place in homes), *answers]
    home, grid = federation(run.path.parents[2], [], handlers)

    control = Control(lambda experiment, name: conduct(grid, home, name, experiment, QUICK))
    monkeypatch.setattr("server.federation.fleet.superlink.connect", lambda _: control)
    said = []
    return ask_audits(home, run.path, plan, said.append, poll_seconds=0.01), said, grid


def test_verdicts_of_all_who_took_part_open_the_gate(run, plan, tmp_path, outcome, monkeypatch):
    homes = [make_site(tmp_path, number) for number in range(2)]
    assert len(gather(run.round_checkpoint(1)).problems) == 5
    files, said, _ = ask(run, plan, homes, monkeypatch)
    assert sorted(said) == [f"site{n}: audited: membership pass, memorisation pass" for n in range(2)]
    assert len(files) == 4 and all(file.parent == run.path / "audits" for file in files)
    evidence = gather(run.round_checkpoint(1))
    assert [line for line in evidence.problems if "audit" in line] == []
    verdict = read_verdict(files[0])
    assert (verdict.site, verdict.figures) == ("site0", {"auc": 0.51})
    assert verdict.checkpoint_digest == load_meta(run.round_checkpoint(1)).digest and len(verdict.references) == 1
    assert not list(run.path.parent.glob("audit-*/*.npy"))
    assert len(read_run(run.path).audits) == 4


def test_a_failed_audit_keeps_the_gate_shut(run, plan, tmp_path, outcome, monkeypatch):
    outcome["passed"] = False
    ask(run, plan, [make_site(tmp_path, 0), make_site(tmp_path, 1)], monkeypatch)
    problems = gather(run.round_checkpoint(1)).problems
    assert sum("memorisation audit of site" in line and "copies" in line for line in problems) == 2


def test_refusals_are_told_and_only_who_took_part_is_asked(run, plan, tmp_path, outcome, monkeypatch):
    homes = [make_site(tmp_path, 0, tasks=("train",)), make_site(tmp_path, 1), make_site(tmp_path, 2)]
    files, said, grid = ask(run, plan, homes, monkeypatch)
    assert [file.name.rsplit("-", 1)[0] for file in files] == ["site1-membership", "site1-memorisation"]
    assert any(line.startswith("site0: refused: task_not_allowed") for line in said)
    assert grid.sites[102].asked == 0
    assert any("audit of site0 is missing" in line for line in gather(run.round_checkpoint(1)).problems)


def test_canaries_of_a_plan_with_dp_are_asked_for_without_a_model(run, plan, tmp_path, monkeypatch):
    question = make_question(run.round_checkpoint(1), replace(plan, canaries=True), "faces")
    assert question.arrays == {} and question.query.evidence == "canaries"
    homes = [make_site(tmp_path, number, max_steps_per_round=100) for number in (0, 1)]
    with pytest.raises(InputError, match="task_not_allowed: the plan trains without DP"):
        ask(run, replace(plan, canaries=True), homes, monkeypatch)


def test_nobody_gives_a_verdict(run, plan, tmp_path, outcome, monkeypatch):
    with pytest.raises(InputError, match=r"no site gave a verdict: .*site1 not online, or no longer registered"):
        ask(run, plan, [make_site(tmp_path, 0, audit=AuditPolicy())], monkeypatch)


def test_hostile_answers_are_rejected(run, plan, monkeypatch):
    def answer(**fields):
        text = json.dumps({"schema_version": 1, **fields})
        return lambda *_: RecordDict({"header": ConfigRecord({"json": text})})

    verdict = {"audit": "membership", "passed": True}
    twice = answer(status="audited", verdicts=[verdict, verdict])
    unasked = answer(status="audited", verdicts=[{**verdict, "audit": "canaries"}])
    with pytest.raises(InputError, match="no site gave a verdict"):
        ask(run, plan, [], monkeypatch, [twice, unasked])
    (metrics,) = run.path.parent.glob("audit-*/metrics.jsonl")
    found = {event["site"]: event for event in read_metrics(metrics) if event["kind"] == "audit"}
    assert found["site0"]["status"] == found["site1"]["status"] == "rejected"
    assert "one verdict per audit" in found["site0"]["reason"]
    assert found["site1"]["reason"] == "an answer with other verdicts than membership and memorisation"


@pytest.mark.parametrize(
    "text",
    [
        "[" * 3_000_000,
        '{"schema_version": 1, "status": ' + "9" * 5000 + "}",
        json.dumps({"schema_version": 1, "status": "audited", "verdicts": [{"audit": "membership", "passed": 1e999}]}),
        "\x1b[2J",
    ],
)
def test_a_hostile_answer_does_not_end_the_question_for_the_others(run, plan, tmp_path, outcome, monkeypatch, text):
    homes = [make_site(tmp_path, 0)]
    hostile = lambda *_: RecordDict({"header": ConfigRecord({"json": text})})  # noqa: E731
    files, said, _ = ask(run, plan, homes, monkeypatch, [hostile])
    assert len(files) == 2
    assert any(line.startswith("site1: rejected") for line in said)


def test_what_a_site_writes_is_one_plain_line_on_the_operators_terminal(run, plan, monkeypatch):
    words = "\x1b]0;pwned\x07\x1b[2J\u202e\nsite9: audited"
    text = json.dumps({"schema_version": 1, "status": "refused", "refusal": "failed", "reason": words})
    with pytest.raises(InputError, match="no site gave a verdict") as caught:
        ask(run, plan, [], monkeypatch, [lambda *_: RecordDict({"header": ConfigRecord({"json": text})})])
    assert str(caught.value).isprintable()


def test_an_answer_cannot_speak_for_another_site_or_model(run, plan, monkeypatch):
    text = json.dumps(
        {
            "schema_version": 1,
            "status": "audited",
            "verdicts": [{"audit": "membership", "passed": True, "site": "site1"}],
        }
    )
    with pytest.raises(InputError, match=r"site0 .*verdicts\.0\.site"):
        ask(run, plan, [], monkeypatch, [lambda *_: RecordDict({"header": ConfigRecord({"json": text})})])


def test_public_fine_tuning_is_sent_as_one_more_reference(run, tmp_path):
    plan = AuditPlan((tmp_path / "public",), public="synthetic:public:8", public_steps=1)
    question = make_question(run.round_checkpoint(1), plan, "faces")
    assert len(question.query.reference_digests) == 2
    assert not np.array_equal(question.arrays["reference-0"], question.arrays["reference-1"])
    assert len({flat.shape for flat in question.arrays.values()}) == 1


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"references": ()}, "--reference"),
    ],
)
def test_bad_plans_are_refused_before_anything_is_asked(run, plan, changes, text):
    with pytest.raises(InputError, match=text):
        make_question(run.round_checkpoint(1), replace(plan, **changes), "faces")


def test_references_of_another_kind_are_refused(run, plan, tmp_path):
    other = parse_experiment("[model]\nimage_size = 16\npatch_size = 16\n")
    save_model(tmp_path / "other", 0, other, step=5)
    with pytest.raises(InputError, match="another network or schedule"):
        make_question(run.round_checkpoint(1), AuditPlan((tmp_path / "other",)), "faces")
    with pytest.raises(InputError, match="audited model itself"):
        make_question(run.round_checkpoint(1), AuditPlan((run.round_checkpoint(1),)), "faces")
    with pytest.raises(InputError, match="lies in no run"):
        ask_audits(tmp_path, tmp_path / "public", plan)


def test_a_checkpoint_without_averaged_weights_is_not_audited(run, plan, tmp_path):
    save_checkpoint(tmp_path / "raw", {"model": {"a": np.zeros(2, np.float32)}}, {"experiment": EXPERIMENT, "step": 1})
    with pytest.raises(InputError, match="no EMA weights"):
        make_question(tmp_path / "raw", plan, "faces")


def test_verdict_files_are_all_taken_or_none(run, tmp_path):
    facts = {"schema": 1, "site": "site0", "checkpoint": "round-000001", "checkpoint_digest": "ab" * 32}
    good = {**facts, "audit": "membership", "passed": True}
    (tmp_path / "good.json").write_text(json.dumps(good))
    for number, change in enumerate(
        ({"audit": "other"}, {"site": "../x"}, {"figures": {"auc": "high"}}, {"figures": {"auc |": 0.5}}, {"schema": 2})
    ):
        (tmp_path / f"bad{number}.json").write_text(json.dumps({**good, **change}))
        with pytest.raises(InputError, match="not an audit verdict"):
            add_verdicts(run.path, [tmp_path / "good.json", tmp_path / f"bad{number}.json"])
    assert not (run.path / "audits").exists()
    with pytest.raises(InputError, match="No such file"):
        add_verdicts(run.path, [tmp_path / "absent.json"])


def test_the_question_names_whom_it_asks(run, plan, tmp_path, outcome, monkeypatch):
    # The checkpoint of this later round is not there yet: who took part in it is not in the audited weights.
    RunLog(run.metrics).write("round", round=2, asked=[{"site": "site7"}], answered=[{"site": "site7"}])
    ask(run, plan, [make_site(tmp_path, 0), make_site(tmp_path, 1)], monkeypatch)
    (file,) = run.path.parent.glob(f"audit-*/{AUDIT_FILE}")
    assert json.loads(file.read_text())["sites"] == ["site0", "site1"]


def test_the_command_hands_its_options_on(run, tmp_path, monkeypatch):
    seen = {}

    def ask_audits(home, path, plan, say):
        seen.update(home=home, path=path, plan=plan)
        say("site0: audited: membership pass")
        return [path / "audits" / "x.json"]

    monkeypatch.setattr("server.release.audit_sites.ask_audits", ask_audits)
    home = run.path.parents[1]
    (home / "coordinator.toml").touch()
    references = [run.round_checkpoint(1), run.round_checkpoint(1)]
    options = [part for each in references for part in ("--reference", str(each))]
    options += ["--public", "synthetic:public:8", "--public-steps", "3"]
    options += ["--site", "site0", "--canaries", "--deadline", "60"]
    result = CliRunner().invoke(cli.app, ["audit", str(run.path), "--home", str(home), *options])
    assert result.exit_code == 0 and "site0: audited" in result.stdout and "x.json" in result.stdout
    assert (seen["home"], seen["path"]) == (home, run.path)
    assert seen["plan"] == AuditPlan(
        tuple(references), "synthetic:public:8", 3, canaries=True, sites=("site0",), deadline_seconds=60.0,
    )  # fmt: skip
