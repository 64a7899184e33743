"""Questions for the mean image: what is charged, what is answered, what is refused, and that it happens once."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, RecordDict

from client.answers.statistics.mean_image import answer_mean_image
from client.answers.statistics.pixel_sum import PixelSummation
from client.home import Home
from client.policy.approval import approve, pending
from client.privacy.epsilon import epsilon_of
from client.records.chain import read_chain
from client.records.ledger import read_ledger
from client.records.spending import Spending
from client.settings import save_settings
from shared.messages.envelope import header_record, read_array, read_header, validated
from shared.messages.statistics import PIXEL_SUM, MeanImageAnswer, MeanImageQuery
from shared.messages.training import experiment_digest
from tests.client.conftest import DP, SIZE, MakeSite, experiment

ALLOWED: dict[str, Any] = {"tasks": ("train", "mean_image"), "min_images_statistics": 2}
PLAN = experiment(privacy={**DP, "mean_image_noise": 2.0})


def question(run: str = "align", plan: Any = PLAN) -> RecordDict:
    return RecordDict({"header": header_record(MeanImageQuery(run=run, experiment=plan))})


def ask(home: Home, asked: RecordDict) -> tuple[MeanImageAnswer, np.ndarray | None]:
    reply = answer_mean_image(asked, home)
    answer = validated(MeanImageAnswer, read_header(reply))
    pixels = read_array(reply, PIXEL_SUM, 3 * SIZE * SIZE) if answer.status == "released" else None
    assert (pixels is None) == (not reply.array_records["arrays"])
    return answer, pixels


def charges(home: Home) -> list[Any]:
    return [charge for _, charge in read_ledger(home.ledger).charges]


def kinds(home: Home) -> list[str]:
    return [entry.kind for entry in read_chain(home.journal)]


@pytest.mark.parametrize(("unit", "num_units"), [("image", 20), ("person", 5)])
def test_release_is_one_gaussian_step_in_the_sites_unit(make_site: MakeSite, unit: str, num_units: int):
    home, _ = make_site(**ALLOWED, unit=unit)
    plan = experiment(privacy={**DP, "unit": unit, "mean_image_noise": 2.0})
    answer, pixels = ask(home, question(plan=plan))
    (charge,) = charges(home)
    assert (charge.task, charge.mechanism, charge.unit, charge.run) == ("mean_image", "gaussian", unit, "align")
    assert (charge.noise_multiplier, charge.sample_rate, charge.steps) == (2.0, 1.0, 1)
    assert answer.epsilon == pytest.approx(epsilon_of([Spending(2.0, 1.0, 1)], 1e-5)) and not answer.is_unbounded
    assert answer.num_units != round(answer.num_units) and abs(answer.num_units - num_units) < 50
    assert pixels is not None and pixels.dtype == np.float32 and np.isfinite(pixels).all()
    assert kinds(home) == ["request", "release"]


def test_charge_is_on_disk_before_the_first_pixel(make_site: MakeSite, monkeypatch: pytest.MonkeyPatch):
    home, _ = make_site(**ALLOWED)

    def fail(*_: object) -> None:
        assert len(charges(home)) == 1
        raise OSError("image file gone")

    with monkeypatch.context() as failing:
        failing.setattr(PixelSummation, "exact", fail)
        answer, _ = ask(home, question())
    assert (answer.refusal, len(charges(home))) == ("failed", 1) and "gone" not in answer.reason
    # What failed after the charge is spent, and the same question is not charged once more.
    assert ask(home, question())[0].refusal == "plan_changed" and len(charges(home)) == 1


def test_repeated_question_gets_the_same_answer_for_one_charge(make_site: MakeSite):
    home, _ = make_site(**ALLOWED)
    (first, pixels), (again, same) = ask(home, question()), ask(home, question())
    np.testing.assert_array_equal(pixels, same)
    assert first == again and len(charges(home)) == 1 and kinds(home)[-1] == "resent"
    other = experiment(privacy={**DP, "mean_image_noise": 2.5})
    assert ask(home, question(plan=other))[0].refusal == "plan_changed"
    # Another run is another release, with noise and a charge of its own.
    _, fresh = ask(home, question("align-2"))
    assert fresh is not None and (fresh != pixels).all() and len(charges(home)) == 2


def test_stored_answer_is_not_sent_after_the_experiment_was_refused(make_site: MakeSite):
    home, _ = make_site(**ALLOWED, experiments="any")
    assert ask(home, question())[0].status == "released"
    approve(home, "refused", experiment_digest(PLAN))
    assert ask(home, question())[0].refusal == "experiment_not_approved"


def test_stored_answer_is_not_sent_under_a_policy_that_asks_for_more_noise(make_site: MakeSite):
    home, settings = make_site(**ALLOWED)
    assert ask(home, question())[0].status == "released"
    strict = settings.policy.model_copy(update={"min_noise_multiplier": 9.0})
    save_settings(home, settings.model_copy(update={"policy": strict}))
    assert ask(home, question())[0].refusal == "noise_too_small"


def test_cap_holds(make_site: MakeSite):
    home, _ = make_site(**ALLOWED, epsilon_cap=2.5)
    assert ask(home, question("first"))[0].status == "released"
    answer, _ = ask(home, question("second"))
    assert answer.refusal == "budget_exceeded" and len(charges(home)) == 1


REFUSALS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"tasks": ("train",)}, {}, "task_not_allowed"),
    ({"tasks": ("mean_image",)}, {}, "task_not_allowed"),
    ({}, {"mean_image_noise": 0.0}, "task_not_allowed"),
    ({"min_noise_multiplier": 2.5}, {"noise_multiplier": 3.0}, "noise_too_small"),
    ({}, {"mean_image_noise": 1e5}, "out_of_range"),
    ({"unit": "person"}, {}, "unit_mismatch"),
    ({"min_images_statistics": 1000}, {}, "policy"),
    ({"experiments": "approved"}, {}, "experiment_not_approved"),
]


@pytest.mark.parametrize(("policy", "privacy", "code"), REFUSALS)
def test_policy_refuses_and_nothing_is_charged(
    make_site: MakeSite, policy: dict[str, Any], privacy: dict[str, Any], code: str
):
    home, _ = make_site(**{**ALLOWED, **policy})
    plan = experiment(privacy={**DP, "mean_image_noise": 2.0, **privacy})
    answer, _ = ask(home, question(plan=plan))
    assert (answer.status, answer.refusal, charges(home)) == ("refused", code, [])
    assert ("1000" not in answer.reason or code == "out_of_range") and kinds(home) == ["request", "refusal"]


def test_experiment_waits_for_approval_and_is_then_answered(make_site: MakeSite):
    home, _ = make_site(**ALLOWED, experiments="approved")
    assert ask(home, question())[0].refusal == "experiment_not_approved"
    assert [path.stem for path in pending(home)] == [experiment_digest(PLAN)]
    approve(home, "experiment", experiment_digest(PLAN))
    assert ask(home, question())[0].status == "released"


def test_other_image_size_is_refused(make_site: MakeSite):
    home, _ = make_site(**ALLOWED)
    plan = PLAN.model_copy(update={"model": PLAN.model.model_copy(update={"image_size": 2 * SIZE})})
    assert ask(home, question(plan=plan))[0].refusal == "data_not_ready" and charges(home) == []


HOSTILE = {
    "nothing": None,
    "no JSON": "{",
    "other schema": '{"schema_version": 2, "run": "a"}',
    "path as run": MeanImageQuery(run="a", experiment=PLAN).model_dump_json().replace('"run":"a"', '"run":"../a"'),
    "negative noise": MeanImageQuery(run="a", experiment=PLAN)
    .model_dump_json()
    .replace('"mean_image_noise":2.0', '"mean_image_noise":-2.0'),
    "infinite noise": MeanImageQuery(run="a", experiment=PLAN)
    .model_dump_json()
    .replace('"mean_image_noise":2.0', '"mean_image_noise":Infinity'),
    "noise without mechanism": MeanImageQuery(run="a", experiment=PLAN)
    .model_dump_json()
    .replace('"mechanism":"dp-sgd"', '"mechanism":"none"'),
    "own clipping norm": MeanImageQuery(run="a", experiment=PLAN)
    .model_dump_json()
    .replace('"run":"a"', '"run":"a","norm":1e-9'),
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_question_is_refused_before_anything(make_site: MakeSite, text: str | None):
    home, _ = make_site(**ALLOWED)
    record = RecordDict({"header": ConfigRecord({"json": text})} if text else {})
    assert ask(home, record)[0].refusal in ("malformed", "schema")
    assert charges(home) == [] and kinds(home) == ["refusal"]


def test_a_rounds_stored_reply_is_left_alone(make_site: MakeSite, tmp_path: Path):
    home, _ = make_site(**ALLOWED)
    kept = home.replies / "align" / f"{'0' * 64}.reply"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"reply of a round of the same name")
    assert ask(home, question())[0].status == "released"
    assert kept.read_bytes() == b"reply of a round of the same name"
