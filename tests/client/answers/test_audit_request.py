"""Audits that the coordinator asks for: what the policy refuses, what leaves, what is charged."""

from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from client.answers.audit_request import answer_audit
from client.answers.verdicts import Verdict
from client.data.dataset import open_dataset
from client.limits import AuditPolicy
from client.policy.approval import approve, pending
from client.policy.audit_rules import AuditFacts, review_audit
from client.policy.rules import HIDDEN
from client.records.journal import Journal
from client.records.ledger import open_ledger, read_ledger
from client.records.spending import Charge
from client.settings import SitePolicy, save_settings
from shared.data.synthetic import write_folder
from shared.errors import InputError
from shared.experiment.config import parse_experiment
from shared.messages.audit import AuditAnswer, AuditQuery, reference_array
from shared.messages.envelope import header_record, read_header, validated
from shared.messages.packing import Manifest, array_digest, pack
from shared.messages.training import experiment_digest
from tests.client.conftest import weights_of

TOML = "[model]\nimage_size = 16\npatch_size = 8\n"
TWO_TIMES = parse_experiment(TOML, ["diffusion.timesteps=2", "evaluation.steps=2"])
ALLOWED = {"tasks": ("audit",), "audit": AuditPolicy(max_per_run=2, noise_multiplier=1.0, max_auc=0.55)}


@pytest.fixture(scope="module")
def packed():
    experiment = parse_experiment(TOML)
    tensors = weights_of(experiment)
    manifest = Manifest.of(tensors)
    model = pack(tensors, manifest)
    return experiment, manifest, model, model * np.float32(0.5)


def query_of(packed, **changes) -> AuditQuery:
    experiment, manifest, model, reference = packed
    fields = {
        "run": "audit-1",
        "checkpoint": "round-000003",
        "checkpoint_digest": "ab" * 32,
        "experiment": experiment,
        "manifest": manifest,
        "model_digest": array_digest(model),
        "reference_digests": (array_digest(reference),),
        "audited_run": "faces",
    }
    return AuditQuery(**{**fields, **changes})


def request(packed, query=None, **arrays) -> RecordDict:
    query = query or query_of(packed)
    own = {"model": packed[2], reference_array(0): packed[3], **arrays}
    record = ArrayRecord({name: Array(array) for name, array in own.items() if array is not None})
    return RecordDict({"arrays": record, "header": header_record(query)})


def ask(site, content) -> AuditAnswer:
    return validated(AuditAnswer, read_header(answer_audit(content, site[0])))


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """240 images of as many persons."""
    folder = tmp_path_factory.mktemp("many")
    write_folder(folder, 240, 16, 3, site="site0", images_per_person=1)
    return folder


@pytest.fixture
def site(make_site, many):
    """A site with one completed round of the run `faces`."""

    def make(**policy):
        home, settings = make_site(many, held_out_ratio=0.5, **{**ALLOWED, **policy})
        spend(home, settings, task="train", run="faces")
        return home, settings

    return make


def spend(home, settings, **fields):
    data = open_dataset(home, 16)
    charge = Charge(
        dataset_id=data.dataset_id, fingerprint=data.fingerprint, server_round=1, request_digest="0" * 64,
        plan_digest="0" * 64, mechanism="gaussian", noise_multiplier=30.0, sample_rate=1.0, steps=1, **fields,
    )  # fmt: skip
    with open_ledger(home.ledger, Path(settings.head_file)) as ledger:
        entry, _ = ledger.reserve(charge, cap=10.0, delta=1e-5, epsilon_of=lambda *_: 1.0)
        ledger.commit(entry)


def audits(home):
    return [charge for _, charge in read_ledger(home.ledger).charges if charge.task == "audit"]


@pytest.fixture
def seen(monkeypatch):
    """What was counted, and what the ledger said by then; the outcome is fixed."""
    given = []

    def counted_verdicts(site, subject, data, unit, audit):
        given.append((subject, unit, audit))
        facts = {"site": site, "checkpoint": subject.checkpoint, "checkpoint_digest": subject.digest}
        return [
            Verdict(audit="membership", passed=True, reason="", figures={"auc": 0.51}, **facts),
            Verdict(audit="memorisation", passed=False, reason="copies", figures={"copied": 0.2}, **facts),
        ]

    monkeypatch.setattr("client.answers.audit_counts.counted_verdicts", counted_verdicts)
    return given


def test_verdicts_of_the_sent_model_leave_and_are_charged(site, packed, seen):
    home = site()
    answer = ask(home, request(packed))
    assert [(each.audit, each.passed, each.reason, each.figures) for each in answer.verdicts] == [
        ("membership", True, "", {"auc": 0.51}), ("memorisation", False, "copies", {"copied": 0.2}),
    ]  # fmt: skip
    ((subject, unit, audit),) = seen
    tensors = dict(subject.model.named_parameters())
    for name, expected in weights_of(packed[0]).items():
        np.testing.assert_array_equal(tensors[name].numpy(), expected)
        np.testing.assert_array_equal(dict(subject.references[0].named_parameters())[name].numpy(), expected / 2)
    assert (subject.checkpoint, subject.digest, unit, audit) == ("round-000003", "ab" * 32, "image", ALLOWED["audit"])
    (charge,) = audits(home[0])
    assert (charge.mechanism, charge.noise_multiplier, charge.sample_rate, charge.steps) == ("gaussian", 1.0, 1.0, 1)
    assert charge.run == "faces"
    kinds = [(entry.kind, entry.fields.get("task")) for entry in Journal(home[0].journal).entries()]
    assert kinds[-2:] == [("request", "audit"), ("release", "audit")]


def test_an_audit_that_fails_was_charged_and_counted_when_its_work_began(site, packed, monkeypatch):
    home = site()

    def fail(*_):
        assert len(audits(home[0])) == 1
        raise InputError("/private/images/alice.png is broken")

    monkeypatch.setattr("client.answers.audit_counts.counted_verdicts", fail)
    answer = ask(home, request(packed))
    assert answer.refusal == "failed" and "alice" not in answer.reason and len(audits(home[0])) == 1
    policy = ALLOWED["audit"].model_copy(update={"max_per_run": 1})
    save_settings(home[0], home[1].model_copy(update={"policy": home[1].policy.model_copy(update={"audit": policy})}))
    assert ask(home, request(packed)).refusal == "too_many_rounds" and len(audits(home[0])) == 1


def test_audits_are_for_runs_with_a_completed_round_here(site, packed, seen):
    home = site()
    assert ask(home, request(packed, query_of(packed, audited_run="other"))).refusal == "task_not_allowed"
    assert not seen and not audits(home[0])


def test_the_cap_holds_for_audits_too(site, packed, seen):
    home = site(epsilon_cap=1.0)
    assert ask(home, request(packed)).refusal == "budget_exceeded"
    assert not seen and not audits(home[0])


def test_too_few_units_are_told_to_the_operator_alone(make_site, packed, seen, caplog):
    home, settings = make_site(None, held_out_ratio=0.5, **ALLOWED)
    spend(home, settings, task="train", run="faces")
    answer = ask((home, settings), request(packed))
    assert (answer.refusal, answer.reason) == ("policy", HIDDEN)
    assert "an audit needs" in caplog.text and not seen and not audits(home)


@pytest.mark.parametrize(
    ("policy", "facts", "changes", "code"),
    [
        ({"tasks": ("train",)}, {}, {}, "task_not_allowed"),
        ({"audit": AuditPolicy()}, {}, {}, "too_many_rounds"),
        ({}, {"audits_of_run": 2}, {}, "too_many_rounds"),
        ({"max_rounds_per_day": 5}, {"audits_last_day": 5}, {}, "too_many_rounds"),
        ({}, {"committed_rounds": 0}, {}, "task_not_allowed"),
        ({"experiments": "approved"}, {}, {}, "experiment_not_approved"),
        (
            {},
            {},
            {"experiment": parse_experiment(TOML, ["diffusion.timesteps=2", "evaluation.steps=2"])},
            "out_of_range",
        ),
        (
            {"max_steps_per_round": 5},
            {},
            {
                "evidence": "canaries",
                "experiment": parse_experiment(TOML, ["federation.local_steps=6"]),
                "model_digest": "",
                "reference_digests": (),
            },
            "too_many_steps",
        ),
        ({}, {"image_size": 32}, {}, "data_not_ready"),
        ({}, {"too_few": "12 held out"}, {}, "policy"),
        ({}, {"is_clock_behind": True}, {}, "clock"),
        ({}, {"refused_experiments": frozenset({"d" * 64})}, {}, "experiment_not_approved"),
    ],
)
def test_rules_refuse(packed, policy, facts, changes, code):
    allowed = SitePolicy(**{**ALLOWED, "experiments": "any", "max_rounds_per_day": 10, **policy})
    known = {"image_size": 16, "approved_experiments": frozenset(), "committed_rounds": 1, **facts}
    found = review_audit(query_of(packed, **changes), allowed, AuditFacts(**known))
    assert found is not None and found.code == code


def test_the_default_policy_audits_nothing(packed):
    facts = AuditFacts(16, frozenset(), committed_rounds=1)
    assert review_audit(query_of(packed), SitePolicy(), facts).code == "task_not_allowed"


def test_experiment_and_reference_need_the_operators_approval(site, packed, seen):
    home, settings = site(experiments="approved")
    assert ask((home, settings), request(packed)).refusal == "experiment_not_approved"
    assert [path.stem for path in pending(home)] == [experiment_digest(packed[0])]
    approve(home, "experiment", experiment_digest(packed[0]))
    reference = array_digest(packed[3])
    answer = ask((home, settings), request(packed))
    assert answer.refusal == "experiment_not_approved" and reference in answer.reason and not seen
    approve(home, "reference", reference)
    assert ask((home, settings), request(packed)).status == "audited"


def test_canaries_touch_no_image_and_cost_nothing(site, packed, monkeypatch):
    from client.privacy.canaries import CanaryResult

    asked = []

    def audit_canaries(plan, delta, rng, **_):
        asked.append((plan.privacy.noise_multiplier, delta))
        return CanaryResult(1.25, 200, 150, 3.5)

    monkeypatch.setattr("client.privacy.canaries.audit_canaries", audit_canaries)
    home = site()
    private = parse_experiment(TOML, ["privacy.mechanism=dp-sgd", "privacy.noise_multiplier=1.7"])
    empty = {"evidence": "canaries", "model_digest": "", "reference_digests": (), "manifest": Manifest(tensors=())}
    content = RecordDict({"header": header_record(query_of(packed, experiment=private, **empty))})
    (verdict,) = ask(home, content).verdicts
    assert (verdict.audit, verdict.passed) == ("canaries", True)
    assert verdict.figures == {"epsilon_at_least": 1.25, "epsilon": 3.5} and asked == [(1.7, 1e-5)]
    assert not audits(home[0])
    plain = RecordDict({"header": header_record(query_of(packed, **empty))})
    assert ask(home, plain).refusal == "task_not_allowed"


def test_a_refusal_loads_no_weights_and_is_noted(site, packed, seen):
    home = site(tasks=("train",))
    answer = ask(home, request(packed, model=None))
    assert answer.refusal == "task_not_allowed" and not seen
    assert Journal(home[0].journal).entries()[-1].fields["code"] == "task_not_allowed"


@pytest.mark.parametrize("name", ["model", "reference-0"])
def test_arrays_are_checked_against_the_header(site, packed, seen, name):
    home = site()
    for array in (None, packed[2][:-1], packed[2] * np.float32(3)):
        assert ask(home, request(packed, **{name: array})).refusal == "malformed"
    assert not seen and not audits(home[0])


def test_weights_that_are_not_finite_or_of_another_network_are_refused(site, packed, seen):
    home = site()
    broken = packed[2].copy()
    broken[7] = np.nan
    query = query_of(packed, model_digest=array_digest(broken))
    assert ask(home, request(packed, query, model=broken)).refusal == "malformed"
    other = query_of(packed, experiment=parse_experiment(TOML.replace("patch_size = 8", "patch_size = 4")))
    assert ask(home, request(packed, other)).refusal == "malformed"
    assert not audits(home[0])


def test_unknown_schema_and_nonsense_are_refused(site, packed):
    home = site()
    assert ask(home, RecordDict({"header": ConfigRecord({"json": '{"schema_version": 3}'})})).refusal == "schema"
    assert ask(home, RecordDict({"header": ConfigRecord({"json": '{"schema_version": 1}'})})).refusal == "malformed"
    assert ask(home, RecordDict({})).refusal == "malformed"


def test_a_running_round_comes_first(site, packed, seen):
    home, settings = site()
    with open_ledger(home.ledger, Path(settings.head_file)):
        assert ask((home, settings), request(packed)).refusal == "ledger_busy"


def test_the_model_is_no_reference_for_itself(packed):
    with pytest.raises(ValueError, match="audited model itself"):
        query_of(packed, reference_digests=(array_digest(packed[2]),))
    with pytest.raises(ValueError, match="counts need a model"):
        query_of(packed, reference_digests=())


def test_questions_of_a_day_are_limited_whatever_became_of_them(site, packed, seen):
    home = site(max_rounds_per_day=2)
    for _ in range(2):
        ask(home, request(packed, query_of(packed, audited_run="other")))
    assert ask(home, request(packed)).refusal == "too_many_rounds"
