"""Audits that the coordinator asks for: what the policy refuses, what leaves, what is charged."""

import datetime as dt
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from client.answers.audit_request import answer_audit
from client.answers.verdicts import Verdict
from client.data.dataset import open_dataset
from client.policy.rules import AuditFacts, review_audit
from client.privacy.epsilon import epsilon_of
from client.records.journal import Journal
from client.records.ledger import open_ledger, read_ledger
from client.records.spending import Charge
from client.settings import SitePolicy
from shared.data.synthetic import write_folder
from shared.errors import InputError
from shared.experiment.config import parse_experiment
from shared.messages.audit import AuditAnswer, AuditQuery, reference_array
from shared.messages.envelope import header_record, read_header, validated
from shared.messages.packing import Manifest, array_digest, pack
from tests.client.conftest import weights_of

TOML = "[model]\nimage_size = 16\npatch_size = 8\n"
ALLOWED = {"tasks": ("audit",), "max_audits_per_day": 2}


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
        "control_steps": 50,
        "num_images": 20,
    }
    return AuditQuery(**{**fields, **changes})


def request(packed, query=None, **arrays) -> RecordDict:
    query = query or query_of(packed)
    own = {"model": packed[2], reference_array(0): packed[3], **arrays}
    record = ArrayRecord({name: Array(array) for name, array in own.items() if array is not None})
    return RecordDict({"arrays": record, "header": header_record(query)})


def ask(site, content) -> AuditAnswer:
    return validated(AuditAnswer, read_header(answer_audit(content, site[0])))


@pytest.fixture
def site(make_site, tmp_path):
    write_folder(tmp_path / "many", 240, 16, 3, site="site0", images_per_person=1)
    return lambda **policy: make_site(tmp_path / "many", held_out_ratio=0.5, **{**ALLOWED, **policy})


@pytest.fixture
def seen(monkeypatch):
    """What the audits were given; their outcome is fixed."""
    given = []

    def audit(home, settings, subject, options):
        given.append((subject, options))
        facts = {"site": settings.alias, "checkpoint": subject.checkpoint, "checkpoint_digest": subject.digest}
        return [
            Verdict(audit="membership", passed=True, reason="", figures={"auc": 0.51}, **facts),
            Verdict(audit="memorisation", passed=False, reason="copies", figures={"copy_rate": 0.2}, **facts),
        ]

    monkeypatch.setattr("client.answers.attacks.audit", audit)
    return given


def test_only_verdicts_of_the_sent_model_leave_and_nothing_is_charged(site, packed, seen):
    home = site()
    answer = ask(home, request(packed))
    assert [(each.audit, each.passed, each.reason, each.figures) for each in answer.verdicts] == [
        ("membership", True, "", {}), ("memorisation", False, "copies", {}),
    ]  # fmt: skip
    ((subject, options),) = seen
    tensors = dict(subject.model.named_parameters())
    for name, expected in weights_of(packed[0]).items():
        np.testing.assert_array_equal(tensors[name].numpy(), expected)
        np.testing.assert_array_equal(dict(subject.references[0].named_parameters())[name].numpy(), expected / 2)
    assert (subject.checkpoint, subject.digest, options.num_images, options.control_steps) == (
        "round-000003", "ab" * 32, 20, 50,
    )  # fmt: skip
    assert read_ledger(home[0].ledger).charges == []
    kinds = [(entry.kind, entry.fields.get("task")) for entry in Journal(home[0].journal).entries()]
    assert kinds[-2:] == [("request", "audit"), ("release", "audit")]


def test_figures_leave_where_the_policy_says_so_and_are_charged_before(site, packed, seen):
    home = site(audit_figures=True)
    answer = ask(home, request(packed, query_of(packed, figures=True)))
    assert answer.verdicts[0].figures == {"auc": 0.51}
    ((_, charge),) = read_ledger(home[0].ledger).charges
    assert (charge.task, charge.mechanism, charge.run) == ("audit", "none", "audit-1")
    assert read_ledger(home[0].ledger).total(open_dataset(home[0], 16).dataset_id, 1e-5, epsilon_of).is_unbounded


def test_the_days_limit_counts_what_was_answered(site, packed, seen):
    home = site(max_audits_per_day=1)
    assert ask(home, request(packed, query_of(packed, figures=True))).refusal == "non_private_forbidden"
    assert ask(home, request(packed)).status == "audited"
    answer = ask(home, request(packed))
    assert (answer.refusal, answer.reason) == ("too_many_rounds", "the site answers at most 1 audits in 24 hours")
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("policy", "facts", "changes", "code"),
    [
        ({"tasks": ("train",)}, {}, {}, "task_not_allowed"),
        ({"max_audits_per_day": 0}, {}, {}, "too_many_rounds"),
        ({}, {"audits_last_day": 2}, {}, "too_many_rounds"),
        ({}, {}, {"control_steps": 101}, "too_many_steps"),
        ({}, {}, {"figures": True}, "non_private_forbidden"),
        ({"audit_figures": True, "require_dp": True}, {}, {"figures": True}, "dp_required"),
        ({"audit_figures": True}, {"spent_unit": "image"}, {"figures": True}, "non_private_forbidden"),
        ({}, {"image_size": 32}, {}, "data_not_ready"),
        ({}, {"num_held_out": 99}, {}, "too_few_images"),
        ({}, {"is_clock_behind": True}, {}, "clock"),
    ],
)
def test_rules_refuse(packed, policy, facts, changes, code):
    allowed = SitePolicy(**{**ALLOWED, "require_dp": False, "max_steps_per_round": 100, **policy})
    found = review_audit(
        query_of(packed, **changes), allowed, AuditFacts(**{"image_size": 16, "num_held_out": 100, **facts})
    )
    assert found is not None and found.code == code


def test_the_default_policy_audits_nothing(packed):
    assert review_audit(query_of(packed), SitePolicy(), AuditFacts(16, 1000)).code == "task_not_allowed"


def test_figures_may_follow_dp_rounds_where_the_policy_says_so(packed):
    policy = SitePolicy(**ALLOWED, require_dp=False, max_steps_per_round=100, audit_figures=True)
    facts = AuditFacts(16, 100, spent_unit="image")
    assert review_audit(query_of(packed, figures=True), policy, facts) is not None
    after = policy.model_copy(update={"non_private_after_dp": True})
    assert review_audit(query_of(packed, figures=True), after, facts) is None


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
    assert not seen


def test_weights_that_are_not_finite_or_of_another_network_are_refused(site, packed, seen):
    home = site()
    broken = packed[2].copy()
    broken[7] = np.nan
    query = query_of(packed, model_digest=array_digest(broken))
    assert ask(home, request(packed, query, model=broken)).refusal == "malformed"
    other = query_of(packed, experiment=parse_experiment(TOML.replace("patch_size = 8", "patch_size = 4")))
    assert ask(home, request(packed, other)).refusal == "malformed"


def test_unknown_schema_and_nonsense_are_refused(site, packed):
    home = site()
    assert ask(home, RecordDict({"header": ConfigRecord({"json": '{"schema_version": 2}'})})).refusal == "schema"
    assert ask(home, RecordDict({"header": ConfigRecord({"json": '{"schema_version": 1}'})})).refusal == "malformed"
    assert ask(home, RecordDict({})).refusal == "malformed"


def test_an_extractor_that_the_policy_does_not_list_is_refused(site, packed, seen):
    asked = query_of(packed, extractor="random_inception", extractor_sha256="cd" * 32)
    assert ask(site(), request(packed, asked)).refusal == "task_not_allowed" and not seen


def test_a_listed_extractor_judges_copies(site, packed, seen):
    from shared.evaluation.networks import load_extractor

    space = load_extractor("random-inception").space
    home = site(extractors=("random-inception",))
    asked = query_of(packed, extractor=space.extractor, extractor_sha256=space.sha256)
    assert ask(home, request(packed, asked)).status == "audited"
    assert seen[0][1].extractor.space == space


def test_a_running_round_comes_first(site, packed, seen):
    home, settings = site()
    with open_ledger(home.ledger, Path(settings.head_file)):
        assert ask((home, settings), request(packed)).refusal == "ledger_busy"


def test_failures_tell_the_coordinator_nothing(site, packed, monkeypatch):
    def fail(*_):
        raise InputError("/private/images/alice.png is broken")

    monkeypatch.setattr("client.answers.attacks.audit", fail)
    answer = ask(site(), request(packed))
    assert answer.refusal == "failed" and "alice" not in answer.reason


def test_figures_after_dp_rounds_are_refused_from_the_ledger(site, packed, seen):
    home, settings = site(audit_figures=True)
    data = open_dataset(home, 16)
    with open_ledger(home.ledger, Path(settings.head_file)) as ledger:
        charge = Charge(
            dataset_id=data.dataset_id, fingerprint=data.fingerprint, task="train", run="r", server_round=1,
            request_digest="0" * 64, plan_digest="0" * 64, mechanism="gaussian", noise_multiplier=3.0,
            sample_rate=1.0, steps=1,
        )  # fmt: skip
        ledger.reserve(charge, cap=10.0, delta=1e-5, epsilon_of=lambda *_: 1.0)
    assert ask((home, settings), request(packed, query_of(packed, figures=True))).refusal == "non_private_forbidden"
    assert ask((home, settings), request(packed)).status == "audited"


def test_the_model_is_no_reference_for_itself(packed):
    with pytest.raises(ValueError, match="audited model itself"):
        query_of(packed, reference_digests=(array_digest(packed[2]),))


def test_audits_of_yesterday_do_not_count(site):
    from client.answers.verdicts import note_release, num_asked_since

    home, _ = site()
    journal = Journal(home.journal)
    note_release(journal, "ab" * 32, figures=False, request_digest="cd" * 32)
    note_release(journal, "ab" * 32, figures=False)
    now = dt.datetime.now(dt.UTC)
    assert num_asked_since(journal, now - dt.timedelta(days=1)) == 1
    assert num_asked_since(journal, now + dt.timedelta(seconds=1)) == 0
