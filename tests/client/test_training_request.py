"""From message to reply: one charge, one answer, and a typed refusal for everything else."""

import errno
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from client.data.dataset import current_id
from client.home import Home
from client.policy import budget
from client.policy.approval import approve, pending, revoke
from client.privacy.epsilon import epsilon_of
from client.private_files import patient_writes
from client.records.chain import Chain, open_chain, read_chain
from client.records.ledger import open_ledger, read_ledger
from client.records.site_log import site_log
from client.settings import save_settings
from client.training import local_round
from client.training_request import handle
from shared.messages.packing import decode
from shared.messages.training import TrainReply, TrainRequest, experiment_digest
from shared.storage import room
from shared.updates.wire_sizes import wire_length
from tests import forked
from tests.client.conftest import DP, MakeSite, experiment, request_for, weights_of

PRIVATE = experiment(privacy=DP)
PLAIN = experiment()


def ask(home: Home, request: TrainRequest) -> TrainReply:
    """Send a request as it travels, and read the reply as the coordinator does."""
    reply = handle(request.to_record(), home)
    return TrainReply.from_record(reply.to_record(), request.header.manifest.num_elements)


def charges(home: Home) -> int:
    return len(read_ledger(home.ledger).charges)


def kinds(home: Home) -> list[str]:
    return [entry.kind for entry in read_chain(home.journal)]


@pytest.mark.parametrize("plan", [PRIVATE, PLAIN], ids=["dp", "plain"])
def test_round_is_charged_trained_and_committed(make_site: MakeSite, plan: Any):
    home, _ = make_site(release_scalars=("loss",))
    reply = ask(home, request_for(plan))
    assert reply.header.status == "trained"
    assert reply.update is not None
    assert np.isfinite(reply.update).all()
    assert np.abs(reply.update).max() > 0
    history = read_ledger(home.ledger)
    assert [entry.kind for entry in history.entries][-2:] == ["reserve", "commit"]
    assert reply.header.ledger_sequence == 2
    assert reply.header.ledger_hash == history.entries[-1].hash
    assert kinds(home) == ["request", "release"]
    if plan is PRIVATE:
        assert reply.header.scalars == {}
        assert reply.header.unit == "image"
        assert reply.header.epsilon is not None
        assert reply.header.epsilon > 0
        assert not reply.header.is_unbounded
    else:
        assert set(reply.header.scalars) == {"loss"}
        assert reply.header.is_unbounded


def test_epsilon_in_replies_grows_over_the_whole_run(make_site: MakeSite):
    home, _ = make_site()
    found = [ask(home, request_for(PRIVATE, number)).header.epsilon for number in (1, 2, 3)]
    assert all(epsilon is not None for epsilon in found)
    assert found == sorted(found)  # type: ignore[type-var]
    assert len(set(found)) == 3


def test_plain_round_repeats_bit_for_bit(make_site: MakeSite):
    home, settings = make_site()
    first = ask(home, request_for(PLAIN))
    for stored in home.replies.rglob("*.reply"):
        stored.unlink()
    second = ask(home, request_for(PLAIN))
    assert first.update is not None
    assert second.update is not None
    assert first.update.tobytes() == second.update.tobytes()
    assert settings.device == "cpu"


def test_same_request_gets_the_same_bytes_for_one_charge(make_site: MakeSite):
    home, _ = make_site()
    first, second = ask(home, request_for(PRIVATE)), ask(home, request_for(PRIVATE))
    assert first.header == second.header
    assert first.update is not None
    assert second.update is not None
    assert first.update.tobytes() == second.update.tobytes()
    assert charges(home) == 1
    assert kinds(home) == ["request", "release", "request", "resent"]
    (stored,) = home.replies.rglob("*.reply")
    assert stored.stat().st_mode & 0o777 == 0o600


def test_stored_reply_is_not_sent_after_leaving(make_site: MakeSite):
    home, settings = make_site()
    ask(home, request_for(PRIVATE))
    closed = settings.policy.model_copy(update={"tasks": ()})
    save_settings(home, settings.model_copy(update={"policy": closed}))
    assert ask(home, request_for(PRIVATE)).header.refusal == "task_not_allowed"


@pytest.mark.parametrize(
    ("plan", "tightened", "code"),
    [
        (PLAIN, {"require_dp": True}, "dp_required"),
        (PLAIN, {"secure": {"require": True}}, "secure_sum"),
        (PRIVATE, {"min_noise_multiplier": 9.0}, "noise_too_small"),
        (PRIVATE, {"unit": "person"}, "unit_mismatch"),
        (PLAIN, {"ranges": {"lr": (0.0, 1e-9)}}, "out_of_range"),
    ],
)
def test_stored_reply_is_not_sent_under_a_policy_that_would_refuse_its_round(
    make_site: MakeSite, plan: Any, tightened: dict[str, Any], code: str
):
    """A line of the new policy after another: what the site no longer does it does not send either."""
    home, settings = make_site()
    assert ask(home, request_for(plan)).header.status == "trained"
    policy = type(settings.policy).model_validate({**settings.policy.model_dump(), **tightened})
    save_settings(home, settings.model_copy(update={"policy": policy}))
    assert ask(home, request_for(plan)).header.refusal == code
    assert (kinds(home)[-1], charges(home)) == ("refusal", 1)
    save_settings(home, settings)
    assert ask(home, request_for(plan)).header.status == "trained" and kinds(home)[-1] == "resent"


def test_stored_reply_is_not_sent_after_the_experiment_was_refused(make_site: MakeSite):
    home, settings = make_site(experiments="any")
    assert settings.policy.experiments == "any"
    assert ask(home, request_for(PRIVATE)).header.status == "trained"
    approve(home, "refused", experiment_digest(PRIVATE))
    assert ask(home, request_for(PRIVATE)).header.refusal == "experiment_not_approved"
    approve(home, "experiment", experiment_digest(PRIVATE))
    assert ask(home, request_for(PRIVATE)).header.status == "trained" and kinds(home)[-1] == "resent"
    revoke(home, experiment_digest(PRIVATE))
    other = experiment_digest(PLAIN)
    approve(home, "refused", other)
    assert ask(home, request_for(PRIVATE)).header.refusal == "experiment_not_approved"


def test_refusal_leaves_ledger_untouched(make_site: MakeSite):
    home, _ = make_site(min_noise_multiplier=2.0)
    before = home.ledger.read_bytes()
    reply = ask(home, request_for(PRIVATE))
    assert (reply.header.status, reply.header.refusal, reply.update) == ("refused", "noise_too_small", None)
    assert home.ledger.read_bytes() == before
    assert kinds(home) == ["request", "refusal"]


def test_round_beyond_the_cap_is_refused(make_site: MakeSite):
    home, _ = make_site(epsilon_cap=3.5)
    assert ask(home, request_for(PRIVATE, 1)).header.status == "trained"
    refused = ask(home, request_for(PRIVATE, 2))
    assert refused.header.refusal == "budget_exceeded"
    assert charges(home) == 1


def test_changed_plan_of_a_run_is_refused(make_site: MakeSite):
    home, _ = make_site()
    ask(home, request_for(PRIVATE))
    changed = experiment(privacy={**DP, "noise_multiplier": 0.9})
    assert ask(home, request_for(changed, 2)).header.refusal == "plan_changed"
    assert ask(home, request_for(changed, 1, run="another")).header.status == "trained"


def test_unknown_experiment_waits_for_approval(make_site: MakeSite):
    home, _ = make_site(experiments="approved")
    assert ask(home, request_for(PRIVATE)).header.refusal == "experiment_not_approved"
    digest = experiment_digest(PRIVATE)
    assert [path.stem for path in pending(home)] == [digest]
    approve(home, "experiment", digest)
    assert pending(home) == []
    assert ask(home, request_for(PRIVATE)).header.status == "trained"


def test_frozen_tensors_are_asked_for_once(make_site: MakeSite):
    home, _ = make_site()
    frozen = tuple(name for name in weights_of(PLAIN) if "attention" not in name)
    plan = experiment(federation={"trainable": ("attention",)})
    whole = request_for(plan, frozen=frozen)
    assert whole.header.manifest.num_elements < whole.header.base_manifest.num_elements
    without = TrainRequest(whole.header, whole.weights)
    assert ask(home, without).header.refusal == "base_missing"
    assert charges(home) == 0
    assert ask(home, whole).header.status == "trained"
    second = request_for(plan, 2, frozen=frozen)
    assert ask(home, TrainRequest(second.header, second.weights)).header.status == "trained"


def test_proximal_term_holds_dp_rounds_back(make_site: MakeSite, monkeypatch: pytest.MonkeyPatch):
    from client.privacy import dp_sgd
    from shared.seeding import Streams

    monkeypatch.setattr(dp_sgd, "secret_streams", lambda: Streams(b"known"))
    home, _ = make_site(epsilon_cap=1000)
    free, held = (
        ask(
            home, request_for(experiment(privacy=DP, federation={"local_steps": 4, "proximal_mu": mu}), run=f"mu{mu:g}")
        )
        for mu in (0.0, 100.0)
    )
    assert free.update is not None
    assert held.update is not None
    assert np.linalg.norm(held.update) < np.linalg.norm(free.update)


def test_update_in_bfloat16_is_half_as_large(make_site: MakeSite):
    home, _ = make_site()
    plan = experiment(federation={"wire_dtype": "bfloat16"})
    reply = ask(home, request_for(plan))
    assert reply.update is not None
    assert reply.update.dtype == np.uint16
    assert np.abs(decode(reply.update, "bfloat16")).max() > 0


def test_updates_of_8_bits_are_a_quarter_as_large(make_site: MakeSite):
    home, _ = make_site()
    told = {}
    for dtype in ("float32", "int8"):
        request = request_for(experiment(federation={"wire_dtype": dtype}), run=dtype)
        answer = handle(request.to_record(), home).to_record()
        reply = TrainReply.from_record(answer, wire_length(len(request.weights), dtype))
        told[dtype] = reply.update
        assert reply.header.status == "trained"
    assert told["int8"].nbytes == pytest.approx(told["float32"].nbytes / 4, rel=0.02)
    update = decode(told["int8"], "int8")
    assert np.abs(update).max() > 0
    again = handle(request.to_record(), home).update
    assert np.array_equal(again, told["int8"]), "the stored reply"


def test_person_unit_trains(make_site: MakeSite):
    home, _ = make_site(unit="person")
    plan = experiment(privacy={**DP, "unit": "person", "draws": 2, "sample_rate": 0.5})
    reply = ask(home, request_for(plan))
    assert reply.header.unit == "person"


def corrupt(record: RecordDict, how: str) -> RecordDict:
    arrays, header = record.array_records["arrays"], record.config_records["header"]
    if how == "no arrays":
        return RecordDict({"header": header, "arrays": ArrayRecord({})})
    if how == "no header":
        return RecordDict({"arrays": arrays})
    if how == "not json":
        return RecordDict({"arrays": arrays, "header": ConfigRecord({"json": "{"})})
    if how == "schema":
        return RecordDict({"arrays": arrays, "header": ConfigRecord({"json": '{"schema_version": 9}'})})
    if how == "hostile shape":
        huge = Array(dtype="float32", shape=(2**40,), stype="numpy.ndarray", data=b"")
        return RecordDict({"arrays": ArrayRecord({"weights": huge}), "header": header})
    return RecordDict({"arrays": ArrayRecord({"weights": Array(np.zeros(3, np.float32))}), "header": header})


@pytest.mark.parametrize("how", ["no arrays", "no header", "not json", "schema", "hostile shape", "short array"])
def test_malformed_messages_are_refused(make_site: MakeSite, how: str):
    home, _ = make_site()
    reply = handle(corrupt(request_for(PLAIN).to_record(), how), home)
    assert reply.header.refusal == ("schema" if how == "schema" else "malformed")
    assert charges(home) == 0


def test_tensors_of_another_model_are_refused_before_the_charge(make_site: MakeSite):
    home, _ = make_site()
    foreign = request_for(PLAIN)
    other = experiment(model={"patch_size": 4})
    header = foreign.header.model_copy(update={"experiment": other})
    assert ask(home, TrainRequest(header, foreign.weights)).header.refusal == "malformed"
    bad = request_for(PLAIN)
    bad.weights[0] = np.nan
    assert ask(home, bad).header.refusal == "malformed"
    assert charges(home) == 0


def test_crash_in_training_leaves_the_charge_and_no_trace_of_the_cause(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
):
    home, settings = make_site()

    def crash(_self: object) -> None:
        raise RuntimeError("/data/alice.png is broken")

    with monkeypatch.context() as patched:
        patched.setattr(local_round.Round, "run", crash)
        reply = ask(home, request_for(PRIVATE))
    assert reply.header.refusal == "failed"
    assert "alice" not in reply.header.model_dump_json()
    total = read_ledger(home.ledger).total(str(current_id(home)), settings.policy.delta, epsilon_of)
    assert total.num_uncommitted == 1
    assert total.epsilon > 0
    assert ask(home, request_for(PRIVATE)).header.status == "trained"
    assert charges(home) == 2


@pytest.mark.parametrize(("kind", "expected"), [("reserve", 0), ("commit", 1)])
def test_full_disk_at_the_ledger_is_a_refusal(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch, kind: str, expected: int
):
    home, _ = make_site()
    append = Chain.append

    def full(self: Chain, each: str, **fields: Any) -> Any:
        if each == kind:
            raise OSError(errno.ENOSPC, "No space left on device")
        return append(self, each, **fields)

    monkeypatch.setattr(Chain, "append", full)
    assert ask(home, request_for(PRIVATE)).header.refusal == "disk_full"
    assert charges(home) == expected


def test_a_full_disk_is_waited_for_whatever_is_written(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Every file that an answer writes is synced: each place meets a full disk at first, and later there is room.

    The answer is the one that would have been given, charged once.
    """
    home, _ = make_site()
    met: set[str] = set()
    looks, sync = [], os.fsync

    def full_at_first(descriptor: int) -> None:
        path = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        if path not in met:
            met.add(path)
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    def has_room(*_: object) -> bool:
        looks.append(True)
        return len(looks) % 2 == 0

    monkeypatch.setattr(room, "has_room", has_room)
    monkeypatch.setattr(room, "LOOK_SECONDS", 0.001)
    monkeypatch.setattr(os, "fsync", full_at_first)
    with patient_writes():
        reply = ask(home, request_for(PLAIN))
    monkeypatch.undo()
    assert {str(home.ledger), str(home.journal), str(home.replies / "run")} <= met
    assert reply.header.status == "trained"
    assert "the disk is full; waiting" in caplog.text
    assert [entry.kind for entry in read_ledger(home.ledger).entries][-2:] == ["reserve", "commit"]
    assert charges(home) == 1
    assert kinds(home) == ["request", "release"]


def test_damaged_ledger_refuses(make_site: MakeSite):
    home, _ = make_site()
    data = bytearray(home.ledger.read_bytes())
    data[20] ^= 1
    home.ledger.write_bytes(bytes(data))
    assert ask(home, request_for(PRIVATE)).header.refusal == "ledger_damaged"


def test_busy_ledger_refuses(make_site: MakeSite):
    home, settings = make_site()
    with open_ledger(home.ledger, Path(settings.head_file)):
        assert ask(home, request_for(PRIVATE)).header.refusal == "ledger_busy"


def test_unscanned_images_refuse(make_site: MakeSite):
    home, _ = make_site()
    (home.datasets / "current").unlink()
    assert ask(home, request_for(PRIVATE)).header.refusal == "data_not_ready"


def test_settings_that_others_can_read_refuse(make_site: MakeSite):
    home, _ = make_site()
    home.settings.chmod(0o644)
    assert ask(home, request_for(PRIVATE)).header.refusal == "failed"


def test_damaged_journal_stops_the_site(make_site: MakeSite):
    home, _ = make_site()
    with open_chain(home.journal, wait=True) as opened:
        opened.append("scan")
    home.journal.write_bytes(home.journal.read_bytes().replace(b"scan", b"scam"))
    assert ask(home, request_for(PRIVATE)).header.status == "refused"
    assert charges(home) == 0


def test_epsilon_without_a_bound_is_sent_as_unbounded(make_site: MakeSite):
    from client.records.spending import Total

    _, settings = make_site()
    total = Total(float("inf"), False, 1e-5, "image", 1, 0)
    spent = budget.told_fields(total, settings.policy)
    assert spent["epsilon"] is None
    assert spent["is_unbounded"] is True


def test_log_stays_at_the_site(make_site: MakeSite, monkeypatch: pytest.MonkeyPatch):
    home, _ = make_site()

    def crash(_self: object) -> None:
        raise RuntimeError("the cause")

    monkeypatch.setattr(local_round.Round, "run", crash)
    with site_log(home):
        ask(home, request_for(PLAIN))
    assert "the cause" in (home.logs / "rounds.log").read_text()
    assert (home.logs / "rounds.log").stat().st_mode & 0o077 == 0
    assert logging.getLogger("maskfed").handlers == []


def test_refusal_loads_neither_torch_nor_opacus(make_site: MakeSite):
    home, _ = make_site(min_noise_multiplier=5.0)
    code = """
import sys
from pathlib import Path
import numpy as np
from client.training_request import handle
from client.home import Home
from shared.experiment.config import parse_experiment
from shared.messages.training import RequestHeader, TrainRequest
from shared.messages.packing import Manifest, TensorSpec
plan = parse_experiment('[privacy]\\nmechanism = "dp-sgd"\\n[federation]\\nlocal_steps = 1\\n')
manifest = Manifest(tensors=(TensorSpec(name="w", shape=(2,)),))
header = RequestHeader(run="r", server_round=1, experiment=plan, precision="float32", manifest=manifest)
reply = handle(TrainRequest(header, np.zeros(2, np.float32)).to_record(), Home(Path(sys.argv[1])))
assert reply.header.refusal == "noise_too_small", reply.header
assert "torch" not in sys.modules and "opacus" not in sys.modules
"""
    root = Path(__file__).parent.parent.parent
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(home.path)], check=True, cwd=root, timeout=120)


def test_plain_round_does_not_load_opacus(tmp_path: Path):
    code = "import sys, client.training.local_round, client.app; sys.exit('opacus' in sys.modules)"
    assert forked.run_code(code, tmp_path / "said") == 0
