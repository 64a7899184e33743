"""`maskfed-client audit`: a model by default, `canaries` by name."""

import json

import pytest
from typer.testing import CliRunner

from client.answers.verdicts import Verdict
from client.cli import main as cli
from client.cli.join import describe
from client.home import Home
from client.limits import AuditPolicy
from client.privacy.canaries import CANARIES, CanaryResult
from client.records.ledger import read_ledger
from client.settings import SitePolicy, load_settings
from shared.errors import InputError
from shared.experiment.config import parse_experiment
from shared.seeding import Streams
from shared.storage.checkpoint import save_checkpoint
from shared.storage.code_digest import installed_digest
from shared.training.weights import new_model
from tests.client.cli.test_main import join, make_bundle


def call(*arguments):
    result = CliRunner().invoke(cli.app, [str(each) for each in arguments])
    if isinstance(result.exception, InputError):
        raise result.exception
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture
def models(tmp_path):
    experiment = parse_experiment("[model]\nimage_size = 16\npatch_size = 8\n")
    for name in ("model", "public"):
        tensors = new_model(experiment, Streams(0, (name,))).state_dict()
        arrays = {key: tensor.numpy() for key, tensor in tensors.items()}
        save_checkpoint(tmp_path / name, {"ema": arrays}, {"experiment": experiment, "round": 1})
    return tmp_path


@pytest.fixture
def found(monkeypatch):
    """What the audits were asked; the verdict on memorisation is a fail on request."""
    seen = {"passed": True}

    def audit(_home, settings, subject, options):
        seen.update(subject=subject, options=options)
        facts = {"site": settings.alias, "checkpoint": subject.checkpoint, "checkpoint_digest": subject.digest}
        reason = "" if seen["passed"] else "copies"
        return [
            Verdict(audit="memorisation", passed=seen["passed"], reason=reason, figures={"copy_rate": 0.5}, **facts)
        ]

    def counted_verdicts(site, subject, *_):
        return [Verdict(site, "membership", subject.checkpoint, subject.digest, True, "", {"auc": 0.5})]

    monkeypatch.setattr("client.answers.attacks.audit", audit)
    monkeypatch.setattr("client.answers.audit_counts.counted_verdicts", counted_verdicts)
    monkeypatch.setattr("client.answers.verdicts.too_few", lambda *_: "")
    return seen


@pytest.mark.parametrize("named", [(), ("model",)])
def test_a_model_is_audited_with_or_without_the_commands_name(make_site, models, found, named):
    home, _ = make_site()
    out = models / "out"
    result = call(
        "audit", *named, models / "model", "--reference", models / "public", "--num", 7, "--control-steps", 3,
        "--set", "evaluation.steps=5", "--out", out, "--home", home.path,
    )  # fmt: skip
    assert result.exit_code == 0 and "memorisation: pass (copy_rate 0.5)" in result.stdout
    assert (found["options"].num_images, found["options"].control_steps, found["options"].extractor) == (7, 3, None)
    assert found["subject"].experiment.evaluation.steps == 5 and len(found["subject"].references) == 1
    (verdict,) = [json.loads(path.read_text()) for path in out.iterdir()]
    assert (verdict["audit"], verdict["figures"]) == ("membership", {"auc": 0.5})
    assert [charge.mechanism for _, charge in read_ledger(home.ledger).charges] == ["gaussian"]


def test_looking_is_free_and_exact_figures_are_a_release_without_dp(make_site, models, found):
    home, _ = make_site(tasks=("audit",))
    options = ("audit", models / "model", "--reference", models / "public", "--home", home.path)
    call(*options)
    assert read_ledger(home.ledger).charges == []
    call(*options, "--figures", "--out", models / "out")
    assert [charge.mechanism for _, charge in read_ledger(home.ledger).charges] == ["none"]
    assert json.loads((models / "out" / "site0-memorisation.json").read_text())["figures"] == {"copy_rate": 0.5}


def test_options_may_stand_before_the_checkpoint(make_site, models, found):
    home, _ = make_site()
    call("audit", "--home", home.path, "--reference", models / "public", models / "model")
    assert found["subject"].checkpoint == "model"


def test_a_failed_audit_is_exit_code_1(make_site, models, found):
    found["passed"] = False
    home, _ = make_site()
    result = call("audit", models / "model", "--reference", models / "public", "--home", home.path)
    assert result.exit_code == 1 and "memorisation: FAIL, copies" in result.stdout


def test_public_images_give_a_second_reference(make_site, models, found):
    home, _ = make_site()
    more = ("--public", "synthetic:public:8", "--public-steps", 1)
    call("audit", models / "model", "--reference", models / "public", *more, "--home", home.path)
    assert len(found["subject"].references) == 2


def test_canaries_print_bound_and_epsilon_and_charge_nothing(make_site, tmp_path, monkeypatch):
    monkeypatch.setattr("client.privacy.canaries.BISECTIONS", 2)
    home, settings = make_site()
    plan = {"noise_multiplier": 1.0, "sample_rate": 0.5, "expected_batch": 100, "micro_batch": 64}
    text = "[federation]\nrounds = 2\nlocal_steps = 2\n[privacy]\nmechanism = 'dp-sgd'\n"
    (tmp_path / "plan.toml").write_text(text + "\n".join(f"{key} = {value}" for key, value in plan.items()))
    result = call("audit", "canaries", tmp_path / "plan.toml", "--home", home.path)
    assert result.exit_code == 0 and ": pass" in result.stdout
    for text in ("4 steps at noise multiplier 1, rate 0.5", "of 1000 guesses correct", "with the noise off: at least"):
        assert text in result.stdout
    assert f"delta {settings.policy.delta:g} per image" in result.stdout
    assert read_ledger(home.ledger).charges == []


def test_accounting_that_promises_too_much_is_exit_code_1(make_site, tmp_path, monkeypatch):
    """What a training comes to is stood in for: `tests/client/privacy/test_canaries.py` trains."""
    promised = lambda *_, **__: CanaryResult(2.0, CANARIES, 900, 0.1, p_value=1.0, promise_p_value=1e-9)  # noqa: E731
    monkeypatch.setattr("client.privacy.canaries.audit_canaries", promised)
    home, _ = make_site()
    (tmp_path / "plan.toml").write_text("[privacy]\nmechanism = 'dp-sgd'\nnoise_multiplier = 0.6\n")
    result = call("audit", "canaries", tmp_path / "plan.toml", "--home", home.path)
    assert result.exit_code == 1 and "FAIL, noise or accounting is wrong" in result.stdout


def test_a_plan_without_dp_is_refused(make_site, tmp_path):
    home, _ = make_site()
    (tmp_path / "plan.toml").write_text("")
    with pytest.raises(InputError, match="without DP"):
        call("audit", "canaries", tmp_path / "plan.toml", "--home", home.path)


def test_the_policy_in_words_tells_what_audits_cost():
    policy = SitePolicy(tasks=("train", "audit"), audit=AuditPolicy(max_per_run=2, noise_multiplier=3.0))
    assert "at most 2 audits of a run's models, each charged like one step of noise 3" in describe(policy)
    assert "audits" not in describe(SitePolicy(tasks=("train",)))


def test_join_writes_how_many_audits_may_be_asked_for(tmp_path, photos):
    home = tmp_path / "joined"
    bundle = make_bundle(tmp_path, home, installed_digest())
    options = ("--task", "train", "--task", "audit", "--max-audits", 3, "--audit-noise", 6)
    result = join(bundle, home, photos, *options)
    policy = load_settings(Home(home)).policy
    assert (policy.tasks, policy.audit.max_per_run, policy.audit.noise_multiplier) == (("train", "audit"), 3, 6.0)
    assert "at most 3 audits of a run's models" in result.stdout


def test_a_scan_tells_that_too_few_units_are_held_out_for_audits(make_site):
    home, _ = make_site(tasks=("train", "audit"))
    found = call("data", "scan", "--home", home.path)
    assert "PROBLEM: audits are refused" in found.stdout and "held-out images" in found.stdout
