"""What stays at the site, moments and what 8 bits have lost: for one plan and data set alone, whatever is killed."""

import dataclasses
import hashlib
import json
import shutil
import stat
from collections.abc import Callable

import numpy as np
import pytest
import torch
from safetensors.numpy import load, save

from client.data.dataset import open_dataset
from client.operator.wipe import wipe
from client.privacy import dp_sgd
from client.training import local_round
from client.training.kept_state import LOST, KeptState, SiteState
from client.training.local_round import Round
from shared.experiment.config import Experiment
from shared.experiment.learning_rate import lr_at
from shared.messages.packing import decode, encode
from tests.client.conftest import DP, SIZE, MakeSite, experiment, request_for

KEEPING = {"keep_moments": True, "rounds": 9}


def plan(**sections) -> Experiment:
    sections["federation"] = {**KEEPING, **sections.get("federation", {})}
    return experiment(**sections)


def run(site: tuple, chosen: Experiment, server_round: int = 1, name: str = "run") -> np.ndarray:
    home, settings = site
    request = request_for(chosen, server_round=server_round, run=name)
    return Round(request, None, open_dataset(home, SIZE), home, settings).run()[0]


def kept(site: tuple, chosen: Experiment, server_round: int, name: str = "run", **data) -> KeptState:
    header = request_for(chosen, server_round=server_round, run=name).header
    return KeptState(site[0], header, dataclasses.replace(open_dataset(site[0], SIZE), **data))


def moments_in(optimizer: torch.optim.Optimizer) -> list[dict[str, torch.Tensor]]:
    """A copy of the state of each parameter that has one, in the optimizer's order."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = [optimizer.state[parameter] for parameter in parameters if parameter in optimizer.state]
    return [{name: value.clone() for name, value in state.items()} for state in states]


def optimizers(monkeypatch: pytest.MonkeyPatch, module) -> list[torch.optim.Optimizer]:
    """Every optimizer that a round makes from now on."""
    made, make = [], module.make_optimizer
    monkeypatch.setattr(module, "make_optimizer", lambda *given: made.append(make(*given)) or made[-1])
    return made


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[torch.optim.Optimizer]:
    from shared.training import engine

    return optimizers(monkeypatch, engine)


@pytest.mark.parametrize(("warmup", "optimizer"), [("round", "adamw"), ("run", "adamw"), ("run", "muon")])
def test_a_round_goes_on_as_torchs_own_state_does(make_site: MakeSite, engines, monkeypatch, warmup, optimizer):
    optim = {"optimizer": optimizer, "warmup_steps": 3, "betas": (0.8, 0.9)}
    chosen = plan(federation={"warmup": warmup}, optim=optim)
    site = make_site()
    run(site, chosen)
    state = engines[0].state_dict()["state"]
    continued = run(site, chosen, 2)

    def go_on(training: Round) -> None:
        training.optimizer.load_state_dict({**training.optimizer.state_dict(), "state": state})

    with monkeypatch.context() as patch:
        patch.setattr(Round, "_continue", go_on)
        np.testing.assert_array_equal(continued, run(site, chosen, 2))
    shutil.rmtree(site[0].kept)
    assert not np.array_equal(continued, run(site, chosen, 2))


def test_a_repeated_round_starts_where_it_did_and_so_does_the_next(make_site: MakeSite):
    site, chosen = make_site(), plan()
    run(site, chosen)
    second, third = run(site, chosen, 2), run(site, chosen, 3)
    np.testing.assert_array_equal(run(site, chosen, 3), third)
    shutil.rmtree(site[0].kept)
    run(site, chosen)
    np.testing.assert_array_equal(run(site, chosen, 2), second)
    np.testing.assert_array_equal(run(site, chosen, 2), second)
    np.testing.assert_array_equal(run(site, chosen, 3), third)


def test_steps_are_counted_over_the_rounds_that_the_site_took_part_in(make_site: MakeSite):
    site, chosen = make_site(), plan(federation={"local_steps": 3})
    for number in (1, 2, 5):
        run(site, chosen, number)
    found = kept(site, chosen, 6).find()
    assert found is not None and found.steps == 9
    assert kept(site, chosen, 2).find() is None


def test_a_private_round_goes_on_with_what_its_noised_gradients_have_left(make_site: MakeSite, monkeypatch):
    made = optimizers(monkeypatch, local_round)
    rates: list[float] = []
    starts: list[list[dict[str, torch.Tensor]]] = []
    set_lr = dp_sgd.set_lr

    def note(optimizer: torch.optim.Optimizer, lr: float) -> None:
        rates.append(lr)
        starts.append(moments_in(optimizer))
        set_lr(optimizer, lr)

    monkeypatch.setattr(dp_sgd, "set_lr", note)
    site, chosen = make_site(), plan(privacy=DP, optim={"warmup_steps": 3}, federation={"warmup": "run"})
    run(site, chosen)
    left = moments_in(made[0])
    run(site, chosen, 2)
    assert starts[0] == [] and len(starts[2]) == len(left) > 0
    for ours, theirs in zip(starts[2], left, strict=True):
        assert float(ours["step"]) == float(theirs["step"]) == 2
        assert all(torch.equal(ours[name], theirs[name]) for name in ("exp_avg", "exp_avg_sq"))
    assert rates == [lr_at(step, chosen.optim) for step in range(4)]


def test_what_was_interrupted_leaves_nothing(make_site: MakeSite, monkeypatch: pytest.MonkeyPatch):
    site, chosen = make_site(), plan(privacy=DP)
    monkeypatch.setattr(dp_sgd, "set_lr", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(site, chosen)
    assert not site[0].kept.exists()


OTHERS: dict[str, Callable[[tuple], KeptState]] = {
    "mechanism": lambda site: kept(site, plan(privacy=DP), 2),
    "unit": lambda site: kept(site, plan(privacy={"unit": "person"}), 2),
    "a constant": lambda site: kept(site, plan(optim={"lr": 1e-3}), 2),
    "the run": lambda site: kept(site, plan(), 2, "other"),
    "the data set": lambda site: kept(site, plan(), 2, dataset_id="ab" * 16),
    "the optimizer": lambda site: kept(site, plan(optim={"optimizer": "muon"}), 2),
    "the wire": lambda site: kept(site, plan(federation={"wire_dtype": "int8"}), 2),
    "its pictures": lambda site: kept(site, plan(), 2, fingerprint="ab" * 32),
}


@pytest.mark.parametrize("changed", OTHERS)
def test_nothing_is_carried_over_where_anything_differs(make_site: MakeSite, changed):
    """Not even by hand: a file that lies where another plan looks for it does not become that plan's."""
    site = make_site()
    run(site, plan())
    assert kept(site, plan(), 2).find() is not None
    shutil.copytree(site[0].kept / "run", site[0].kept / "other")
    assert OTHERS[changed](site).find() is None


def forged(body: bytes, change: Callable[[dict], None]) -> bytes:
    arrays = load(body)
    change(arrays)
    return save(arrays)


def first(arrays: dict, end: str) -> str:
    return next(name for name in sorted(arrays) if name.endswith(end))


def put(end: str, value: float) -> Callable[[dict], None]:
    return lambda arrays: arrays[first(arrays, end)].reshape(-1).__setitem__(0, value)


def without_moments(wire_dtype: str) -> Experiment:
    return plan(federation={"keep_moments": False, "wire_dtype": wire_dtype, "max_update_norm": 0.0})


@pytest.fixture
def rounded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[np.ndarray, np.ndarray | None]]:
    """Each update before it is rounded, and what joined it."""
    seen, before = [], local_round.rounded_with_feedback
    monkeypatch.setattr(local_round, "rounded_with_feedback", lambda *given: seen.append(given) or before(*given))
    return seen


@pytest.mark.parametrize("with_moments", [False, True])
def test_what_8_bits_lose_of_an_update_joins_the_next_one(make_site: MakeSite, rounded, with_moments):
    site, chosen = make_site(), plan(federation={"wire_dtype": "int8", "keep_moments": with_moments})
    arrived = [run(site, chosen, number) for number in (1, 2, 4)]
    assert [lost is not None for _, lost in rounded] == [False, True, True]
    left = kept(site, chosen, 5).find()
    assert left is not None and left.lost is not None
    assert left.steps == 6 and (len(left.arrays) > 1) is with_moments
    total, told = (
        sum(update.astype(np.float64) for update, _ in rounded),
        sum(each.astype(np.float64) for each in arrived),
    )
    np.testing.assert_allclose(told + left.lost, total, atol=1e-9)
    assert np.abs(told - total).max() < sum(np.abs(each).max() for each in arrived) / 127
    for each in arrived:
        assert np.array_equal(decode(encode(each, "int8"), "int8"), each), "what is sent is what has been counted"


def test_a_round_that_is_asked_again_tells_the_same_bits_wherever_it_was_killed(make_site: MakeSite, monkeypatch):
    site, chosen = make_site(), without_moments("int8")
    run(site, chosen)
    second, third = run(site, chosen, 2), run(site, chosen, 3)
    with monkeypatch.context() as patch:
        patch.setattr(KeptState, "keep", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(site, chosen, 3)
    for _ in range(2):
        np.testing.assert_array_equal(run(site, chosen, 3), third)
    shutil.rmtree(site[0].kept)
    assert not np.array_equal(run(site, chosen, 2), second)


def test_numbers_of_other_widths_leave_nothing_behind(make_site: MakeSite):
    site = make_site()
    for dtype in ("float32", "bfloat16"):
        run(site, without_moments(dtype))
    assert not site[0].kept.exists()


HOSTILE: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda _: b"",
    "cut": lambda body: body[:-5],
    "not finite": lambda body: forged(body, put(".exp_avg", np.nan)),
    "negative squares": lambda body: forged(body, put(".exp_avg_sq", -1.0)),
    "one missing": lambda body: forged(body, lambda arrays: arrays.pop(first(arrays, ".exp_avg"))),
    "one more": lambda body: forged(body, lambda arrays: arrays.update(more=np.zeros(1, np.float32))),
    "another type": lambda body: forged(
        body, lambda arrays: arrays.update({first(arrays, ".exp_avg"): np.zeros(3, np.float64)})
    ),
    "no tensors": lambda _: b"\x80\x04pickle",
    "what was lost not finite": lambda body: forged(body, put(LOST, np.inf)),
    "what was lost of another model": lambda body: forged(
        body, lambda arrays: arrays.update({LOST: np.zeros(3, np.float32)})
    ),
    "nothing was lost": lambda body: forged(body, lambda arrays: arrays.pop(LOST)),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("is_signed", [False, True])
def test_what_no_optimizer_can_have_written_counts_as_not_there(make_site: MakeSite, name, is_signed):
    """With the digest that fits and without: the round before is used, and no number of the file."""
    site, chosen = make_site(), plan(federation={"wire_dtype": "int8"})
    run(site, chosen)
    older = kept(site, chosen, 2).find()
    run(site, chosen, 2)
    path = max((site[0].kept / "run").iterdir())
    head, _, body = path.read_bytes().partition(b"\n")
    changed = HOSTILE[name](body)
    label = json.loads(head) | ({"sha256": hashlib.sha256(changed).hexdigest()} if is_signed else {})
    path.write_bytes(json.dumps(label).encode() + b"\n" + changed)
    found = kept(site, chosen, 3).find()
    assert found is not None and older is not None
    assert found.steps == older.steps and found.arrays.keys() == older.arrays.keys()
    for label in (b"[]\n", b"[" * 1023 + b"\n"):
        path.write_bytes(label)
        assert kept(site, chosen, 3).find() is not None
    path.unlink()
    path.mkdir()  # what cannot even be opened
    assert kept(site, chosen, 3).find() is not None


def test_files_are_the_sites_own_and_few(make_site: MakeSite):
    site = make_site()
    for name in "abcde":
        for number in (1, 2, 3, 9):
            last = kept(site, plan(), number, name)
            last.keep(SiteState(number, {}))
    assert sorted(each.name for each in site[0].kept.iterdir()) == ["b", "c", "d", "e"]
    files = [each for each in site[0].kept.rglob("*") if each.is_file()]
    assert sorted(each.name for each in files) == ["round-000000002"] * 4 + ["round-000000003"] * 4
    assert {stat.S_IMODE(each.stat().st_mode) for each in files} == {0o600}
    assert {stat.S_IMODE(each.stat().st_mode) for each in site[0].kept.rglob("*") if each.is_dir()} == {0o700}
    assert "removed kept/" in wipe(site[0])


def test_a_run_that_keeps_nothing_writes_nothing(make_site: MakeSite):
    site = make_site()
    run(site, experiment())
    assert not site[0].kept.exists()
