"""What is spent is on disk before it is spent, and an older or changed ledger trains nothing."""

import datetime as dt
import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest

from client.records import chain
from client.records.chain import BusyError, ChainError, Entry
from client.records.data_registry import DataRegistry, Identity, Records, registry_folder
from client.records.history import History
from client.records.ledger import (
    BudgetError,
    ClockError,
    Ledger,
    OutdatedDataError,
    UnitError,
    open_ledger,
    read_ledger,
)
from client.records.spending import Charge, Spending
from shared.errors import InputError


def epsilon_of(history: list[Spending], delta: float) -> float:
    """A stand-in: epsilon is the number of steps over sigma."""
    return sum(row.steps / row.noise_multiplier for row in history)


def charge(**changed: object) -> Charge:
    fields = {
        "dataset_id": "a",
        "fingerprint": "f",
        "task": "train",
        "run": "run",
        "server_round": 1,
        "request_digest": "r",
        "plan_digest": "p",
        "mechanism": "dp-sgd",
        "noise_multiplier": 1.0,
        "sample_rate": 0.1,
        "steps": 2,
    }
    return Charge(**{**fields, **changed})


@pytest.fixture
def head(tmp_path: Path) -> Path:
    return tmp_path / "elsewhere" / "head.json"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "home" / "ledger.jsonl"


def spend(ledger: Ledger, cap: float = 100.0, *, commit: bool = True, **changed: object) -> float:
    entry, total = ledger.reserve(charge(**changed), cap=cap, delta=1e-5, epsilon_of=epsilon_of)
    if commit:
        ledger.commit(entry)
    return total.epsilon


def test_total_adds_up_over_rounds_runs_and_restarts(path: Path, head: Path):
    for number in range(3):
        with open_ledger(path, head) as ledger:
            assert spend(ledger, run=f"run{number}") == 2.0 * (number + 1)
    total = read_ledger(path).total("a", 1e-5, epsilon_of)
    assert (total.epsilon, total.is_unbounded, total.unit, total.num_charges) == (6.0, False, "image", 3)


def test_reservation_without_commit_counts_as_spent(path: Path, head: Path):
    with open_ledger(path, head) as ledger:
        spend(ledger, commit=False)
    with open_ledger(path, head) as ledger:
        assert spend(ledger) == 4.0
        total = ledger.total("a", 1e-5, epsilon_of)
    assert total.num_uncommitted == 1


def test_charge_beyond_the_cap_is_refused_and_leaves_the_ledger_untouched(path: Path, head: Path):
    with open_ledger(path, head) as ledger:
        spend(ledger, cap=4.0)
        spend(ledger, cap=4.0)
        before = path.read_bytes()
        with pytest.raises(BudgetError, match=r"would be 6\.000, the cap is 4"):
            spend(ledger, cap=4.0)
    assert path.read_bytes() == before


def test_charge_without_a_bound_is_refused(path: Path, head: Path):
    with open_ledger(path, head) as ledger, pytest.raises(BudgetError):
        ledger.reserve(charge(), cap=100, delta=1e-5, epsilon_of=lambda *_: math.inf)
    with open_ledger(path, head) as ledger, pytest.raises(BudgetError):
        ledger.reserve(charge(), cap=100, delta=1e-5, epsilon_of=lambda *_: math.nan)


def test_release_without_dp_makes_the_total_unbounded_for_ever(path: Path, head: Path):
    with open_ledger(path, head) as ledger:
        spend(ledger)
        spend(ledger, mechanism="none")
        spend(ledger)
        total = ledger.total("a", 1e-5, epsilon_of)
    assert total.is_unbounded
    assert total.epsilon == 4.0
    assert "unbounded" in str(total)


def test_data_sets_are_counted_apart_unless_they_share_records(path: Path, head: Path):
    with open_ledger(path, head) as ledger:
        spend(ledger, dataset_id="a")
        assert spend(ledger, dataset_id="b") == 2.0
        ledger.register("c", ["a"], "f")
        assert spend(ledger, dataset_id="c") == 4.0
        ledger.register("d", ["b", "c"], "f")
        assert ledger.linked("d") == {"a", "b", "c", "d"}
        assert spend(ledger, dataset_id="d") == 8.0
        assert spend(ledger, dataset_id="a") == 10.0, "sharing counts in both directions"


def test_registering_the_same_facts_twice_is_one_entry(path: Path, head: Path):
    with open_ledger(path, head) as ledger:
        ledger.register("a", [], "f")
        size = len(ledger.entries)
        ledger.register("a", [], "f")
        assert len(ledger.entries) == size


def test_unit_is_fixed_by_the_first_dp_charge(path: Path, head: Path):
    with open_ledger(path, head) as ledger:
        spend(ledger, mechanism="none")
        assert ledger.unit_of("a") is None
        spend(ledger, unit="person")
        assert ledger.unit_of("a") == "person"
        with pytest.raises(UnitError):
            spend(ledger, unit="image")
        spend(ledger, dataset_id="other", unit="image")


def test_plan_and_rounds_of_a_run_are_remembered(path: Path, head: Path):
    with open_ledger(path, head) as ledger:
        assert ledger.plan_of("run") is None
        spend(ledger, plan_digest="first")
        spend(ledger, plan_digest="second", commit=False)
        spend(ledger, run="other")
        spend(ledger, plan_digest="of a question", task="statistics")
        assert ledger.plan_of("run") == "first"
        assert ledger.num_committed("run") == 1
        assert ledger.num_since(dt.datetime.now(dt.UTC) - dt.timedelta(hours=1)) == 4
        assert ledger.num_since(dt.datetime.now(dt.UTC) + dt.timedelta(hours=1)) == 0


def test_commit_twice_is_one_entry(path: Path, head: Path):
    with open_ledger(path, head) as ledger:
        entry, _ = ledger.reserve(charge(), cap=9, delta=1e-5, epsilon_of=epsilon_of)
        ledger.commit(entry)
        size = len(ledger.entries)
        ledger.commit(entry)
        assert len(ledger.entries) == size


def test_head_is_kept_elsewhere_and_follows(path: Path, head: Path):
    with open_ledger(path, head) as ledger:
        spend(ledger)
        newest = ledger.head
    kept = json.loads(head.read_bytes())
    assert (kept["sequence"], kept["hash"]) == tuple(newest)
    assert head.stat().st_mode & 0o777 == 0o600


def test_restored_backup_refuses_to_train(path: Path, head: Path):
    with open_ledger(path, head) as ledger:
        spend(ledger)
    backup = path.read_bytes()
    with open_ledger(path, head) as ledger:
        spend(ledger)
    path.write_bytes(backup)
    with pytest.raises(ChainError, match="an older copy and has forgotten"), open_ledger(path, head):
        pass


def test_deleted_ledger_refuses_to_start_again(path: Path, head: Path):
    with open_ledger(path, head) as ledger:
        spend(ledger)
    path.unlink()
    with pytest.raises(ChainError, match="0 entries"), open_ledger(path, head):
        pass


def test_rewritten_history_refuses_to_train(path: Path, head: Path, tmp_path: Path):
    for target in (path, tmp_path / "other" / "ledger.jsonl"):
        with open_ledger(target, head if target == path else tmp_path / "x" / "head.json") as ledger:
            spend(ledger, steps=1 if target != path else 5)
    path.write_bytes((tmp_path / "other" / "ledger.jsonl").read_bytes())
    with pytest.raises(ChainError, match="another ledger"), open_ledger(path, head):
        pass


def test_forked_ledger_refuses_to_train(path: Path, head: Path, tmp_path: Path):
    """Same ledger, longer even, but another entry where the head has seen one: written on a copy."""
    with open_ledger(path, head) as ledger:
        spend(ledger)
    copy, kept = tmp_path / "copy" / "ledger.jsonl", tmp_path / "kept" / "head.json"
    for source, target in ((path, copy), (head, kept)):
        target.parent.mkdir()
        target.write_bytes(source.read_bytes())
        target.chmod(0o600)
    with open_ledger(path, head) as ledger:
        spend(ledger, run="here")
    with open_ledger(copy, kept) as ledger:
        for number in range(3):
            spend(ledger, run=f"there{number}")
    path.write_bytes(copy.read_bytes())
    with pytest.raises(ChainError, match="is not the one seen: restore the newest copy"), open_ledger(path, head):
        pass


def test_reserve_counts_its_own_charge_as_open(path: Path, head: Path):
    with open_ledger(path, head) as ledger:
        spend(ledger)
        spend(ledger, commit=False)
        _, total = ledger.reserve(charge(), cap=9, delta=1e-5, epsilon_of=epsilon_of)
    assert (total.num_charges, total.num_uncommitted) == (3, 2)


@pytest.mark.parametrize("mechanism", ["dp-sgd", "gaussian"])
def test_cap_holds_for_every_private_mechanism(path: Path, head: Path, mechanism: str):
    with open_ledger(path, head) as ledger:
        assert spend(ledger, cap=2.0, mechanism=mechanism) == 2.0
        with pytest.raises(BudgetError):
            spend(ledger, cap=3.9, mechanism=mechanism)


def test_question_about_a_run_is_no_round_of_it(path: Path, head: Path):
    with open_ledger(path, head) as ledger:
        spend(ledger, plan_digest="question", task="statistics")
        assert ledger.plan_of("run") is None and ledger.num_committed("run") == 0
        spend(ledger, plan_digest="plan")
        assert ledger.plan_of("run") == "plan" and ledger.num_committed("run") == 1


def test_only_the_newest_generation_of_a_data_set_is_charged(path: Path, head: Path):
    with open_ledger(path, head) as ledger:
        for fingerprint in ("one", "two", "one"):
            ledger.register("a", [], fingerprint)
        ledger.register("b", [], "two")
        entries = len(ledger.entries)
        with pytest.raises(OutdatedDataError):
            spend(ledger, fingerprint="two")
        assert len(ledger.entries) == entries
        assert spend(ledger, fingerprint="one") == 2.0


def test_registration_is_that_of_the_newest_scan(path: Path, head: Path):
    with open_ledger(path, head) as ledger:
        for fingerprint in ("one", "two"):
            ledger.register("a", [], fingerprint)
        newest = ledger.registration("a")
        assert newest is not None and newest["fingerprint"] == "two"
        assert spend(ledger, fingerprint="two") == 2.0


@pytest.mark.parametrize("is_charged", [False, True])
def test_lost_head_matters_from_the_first_reservation_on(path: Path, head: Path, is_charged: bool):
    with open_ledger(path, head) as ledger:
        if is_charged:
            spend(ledger, commit=False)
        else:
            for name in "abc":
                ledger.register(name, [], "f")
    head.unlink()
    if is_charged:
        with pytest.raises(ChainError, match="--adopt"), open_ledger(path, head):
            pass
    else:
        with open_ledger(path, head) as ledger:
            assert len(ledger.entries) == 4


ONE, TWO, STRANGER = "1" * 32, "2" * 32, "3" * 32


@pytest.fixture
def homes(tmp_path: Path) -> dict[str, tuple[Path, Path]]:
    """Three sites of one machine; the first two share records."""
    registry = DataRegistry(registry_folder())
    registry.prepare()
    places = {}
    for dataset_id, linked in ((ONE, ()), (TWO, (ONE,)), (STRANGER, ())):
        place = tmp_path / dataset_id[:1]
        places[dataset_id] = place / "ledger.jsonl", tmp_path / f"{place.name}.head"
        with open_ledger(*places[dataset_id]) as ledger:
            ledger.register(dataset_id, list(linked), "f")
            ledger_id = str(ledger.ledger_id)
        identity = Identity(
            dataset_id=dataset_id, ledger_id=ledger_id, home=str(place), key_id="k", fingerprint="f", linked=linked
        )
        registry.publish(identity, Records(key_id="k", records={}))
    return places


def spent(homes: dict[str, tuple[Path, Path]], dataset_id: str) -> float:
    with open_ledger(*homes[dataset_id]) as ledger:
        return ledger.total(dataset_id, 1e-5, epsilon_of).epsilon


def test_homes_of_one_machine_count_what_any_of_them_has_spent_on_shared_records(homes: dict[str, tuple[Path, Path]]):
    with open_ledger(*homes[ONE]) as ledger:
        spend(ledger, dataset_id=ONE, steps=2)
    assert spent(homes, TWO) == 2.0, "seen as soon as the ledger is opened"
    with open_ledger(*homes[TWO]) as ledger:
        assert spend(ledger, dataset_id=TWO, steps=3) == 5.0
        assert spend(ledger, dataset_id=TWO, steps=4) == 9.0
    with open_ledger(*homes[ONE]) as ledger:
        assert ledger.linked(ONE) == {ONE, TWO}, "the other home has found the link"
        assert ledger.total(ONE, 1e-5, epsilon_of).epsilon == 9.0
        with pytest.raises(BudgetError):
            spend(ledger, cap=9.9, dataset_id=ONE, steps=1)


def test_home_takes_over_each_charge_once_and_nothing_of_strangers(homes: dict[str, tuple[Path, Path]]):
    for dataset_id, places in homes.items():
        with open_ledger(*places) as ledger:
            spend(ledger, dataset_id=dataset_id)
    with open_ledger(*homes[TWO]) as ledger:
        spend(ledger, dataset_id="4" * 32, steps=50)  # on images of the other home that are not here
    assert [spent(homes, each) for each in (ONE, TWO, STRANGER)] == [4.0, 4.0, 2.0]
    for dataset_id, others in ((ONE, 1), (TWO, 1), (STRANGER, 0)):
        with open_ledger(*homes[dataset_id]) as ledger:
            size = len(ledger.entries)
            assert len(ledger.inherited) == others
        with open_ledger(*homes[dataset_id]) as ledger:
            assert len(ledger.entries) == size, "nothing new, nothing written"


@pytest.mark.parametrize("num_before", [0, 1])
@pytest.mark.parametrize("has_head", [False, True])
def test_copy_of_a_home_has_no_budget_of_its_own(
    homes: dict[str, tuple[Path, Path]], tmp_path: Path, num_before: int, *, has_head: bool
):
    other = tmp_path / "copy" / "ledger.jsonl", tmp_path / "copy.head"
    other[0].parent.mkdir()
    with open_ledger(*homes[ONE]) as ledger:
        for _ in range(num_before):
            spend(ledger, dataset_id=ONE)
    for source, target in zip(homes[ONE], other[: 1 + has_head], strict=False):
        shutil.copy(source, target)
    with open_ledger(*homes[ONE]) as ledger:
        spend(ledger, dataset_id=ONE)
    before = other[0].read_bytes()
    for adopt in (False, True):
        words = "older copy, or a copy of another home" if adopt or has_head or not num_before else "--adopt"
        with pytest.raises(ChainError, match=words), open_ledger(*other, adopt=adopt):
            pass
        assert other[0].read_bytes() == before, "refused before anything is written"
    with open_ledger(*homes[ONE]) as ledger:
        assert spend(ledger, dataset_id=ONE) == 2.0 * (num_before + 2), "the home that was charged first goes on"


def test_copy_that_was_charged_as_often_is_told_by_what_was_charged(homes: dict[str, tuple[Path, Path]]):
    path, head = homes[ONE]
    kept = path.read_bytes(), head.read_bytes()
    with open_ledger(path, head) as ledger:
        spend(ledger, dataset_id=ONE, steps=7)
    registry = DataRegistry(registry_folder())
    newest = registry.charges(str(read_ledger(path).ledger_id))
    path.write_bytes(kept[0])
    head.write_bytes(kept[1])
    registry.publish_charges(str(read_ledger(path).ledger_id), [])
    (registry.folder / f"{read_ledger(path).ledger_id}.head").unlink()
    with open_ledger(path, head) as ledger:
        spend(ledger, dataset_id=ONE, steps=3)
    registry.publish_charges(str(read_ledger(path).ledger_id), list(newest))
    with pytest.raises(ChainError, match="charges of this ledger that are not in it"), open_ledger(path, head):
        pass


def test_copies_charged_for_the_same_request_at_the_same_moment_are_told_apart(
    homes: dict[str, tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
):
    path, head = homes[ONE]
    with open_ledger(path, head) as ledger:
        ledger_id = str(ledger.ledger_id)

    moment = dt.datetime.now(dt.UTC)

    class Stopped(dt.datetime):
        @classmethod
        def now(cls, _zone: dt.tzinfo | None = None) -> dt.datetime:
            return moment

    monkeypatch.setattr(chain.dt, "datetime", Stopped)
    registry, before = DataRegistry(registry_folder()), (path.read_bytes(), head.read_bytes())
    with open_ledger(path, head) as ledger:
        spend(ledger, dataset_id=ONE)
    first = {name: (registry.folder / f"{ledger_id}.{name}").read_bytes() for name in ("charges", "head")}
    path.write_bytes(before[0])
    head.write_bytes(before[1])
    for name in first:
        (registry.folder / f"{ledger_id}.{name}").unlink()
    with open_ledger(path, head) as ledger:
        spend(ledger, dataset_id=ONE)
    assert (registry.folder / f"{ledger_id}.charges").read_bytes() == first["charges"], "the same in all but the salt"
    with open_ledger(path, head):
        pass
    for name, data in first.items():
        registry.write(f"{ledger_id}.{name}", data)
    with pytest.raises(ChainError, match="charges of this ledger that are not in it"), open_ledger(path, head):
        pass


@pytest.mark.parametrize("cut", ["between the two files", "an older version"])
def test_charges_published_without_their_head_are_still_compared(homes: dict[str, tuple[Path, Path]], cut: str):
    path, head = homes[ONE]
    with open_ledger(path, head) as ledger:
        spend(ledger, dataset_id=ONE, steps=3)
    registry, ledger_id = DataRegistry(registry_folder()), str(read_ledger(path).ledger_id)
    older = (registry.folder / f"{ledger_id}.head").read_bytes()
    kept = path.read_bytes(), head.read_bytes()
    with open_ledger(path, head) as ledger:
        spend(ledger, dataset_id=ONE, steps=4)
    if cut == "an older version":
        (registry.folder / f"{ledger_id}.head").unlink()
    else:
        registry.write(f"{ledger_id}.head", older)
    with open_ledger(path, head) as ledger:
        assert spend(ledger, dataset_id=ONE, steps=5) == 12.0, "the newest goes on, and shows its head again"
    assert (registry.folder / f"{ledger_id}.head").exists()
    registry.write(f"{ledger_id}.head", older)
    path.write_bytes(kept[0])
    head.write_bytes(kept[1])
    with pytest.raises(ChainError, match="charges of this ledger that are not in it"), open_ledger(path, head):
        pass


@pytest.mark.parametrize("damage", ["missing", "garbled"])
def test_lost_head_needs_the_operators_word(path: Path, head: Path, damage: str):
    with open_ledger(path, head) as ledger:
        spend(ledger)
    if damage == "missing":
        head.unlink()
    else:
        head.write_text("{}")
    with pytest.raises(ChainError, match="--adopt"), open_ledger(path, head):
        pass
    with open_ledger(path, head, adopt=True) as ledger:
        assert ledger.entries[-1].kind == "adopted"
    with open_ledger(path, head) as ledger:
        assert spend(ledger) == 4.0


def test_truncated_ledger_refuses_to_train(path: Path, head: Path):
    with open_ledger(path, head) as ledger:
        spend(ledger)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    with pytest.raises(ChainError), open_ledger(path, head):
        pass


def test_torn_commit_leaves_the_reservation_standing(path: Path, head: Path):
    with open_ledger(path, head) as ledger:
        ledger.reserve(charge(), cap=9, delta=1e-5, epsilon_of=epsilon_of)
    with path.open("ab") as file:
        file.write(b'{"fields":{"reserve":1')
    with open_ledger(path, head) as ledger:
        assert ledger.entries[-1].kind == "recovered"
        assert ledger.total("a", 1e-5, epsilon_of).num_uncommitted == 1


def test_two_processes_cannot_hold_the_ledger(path: Path, head: Path):
    with open_ledger(path, head), pytest.raises(BusyError), open_ledger(path, head):
        pass


def test_clock_before_an_entry_is_noticed(path: Path, head: Path):
    with open_ledger(path, head) as ledger:
        now = dt.datetime.now(dt.UTC)
        assert not ledger.is_clock_behind(now)
        assert not ledger.is_clock_behind(now - dt.timedelta(minutes=4))
        assert ledger.is_clock_behind(now - dt.timedelta(minutes=6))


DAY = dt.timedelta(days=1)


@contextmanager
def clock_at(moment: dt.datetime, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(chain.dt, "datetime", mock.Mock(wraps=dt.datetime, now=lambda zone: moment))
        yield


def write_at(ledger: Ledger, moment: dt.datetime, monkeypatch: pytest.MonkeyPatch, **changed: object) -> None:
    with clock_at(moment, monkeypatch):
        spend(ledger, **changed)


def test_entry_dated_ahead_keeps_the_clock_behind_whatever_is_written_later(
    path: Path, head: Path, monkeypatch: pytest.MonkeyPatch
):
    now = dt.datetime.now(dt.UTC)
    with open_ledger(path, head) as ledger:
        write_at(ledger, now + 400 * DAY, monkeypatch)
        ledger.register("a", [], "f")
        assert ledger.is_clock_behind(now)


def test_nothing_is_charged_before_an_entry_whatever_it_is_for(path: Path, head: Path, monkeypatch: pytest.MonkeyPatch):
    with open_ledger(path, head) as ledger:
        write_at(ledger, dt.datetime.now(dt.UTC) + 2 * DAY, monkeypatch)
        for task, mechanism in (("statistics", "none"), ("statistics", "gaussian"), ("audit", "gaussian")):
            with pytest.raises(ClockError, match="accept-clock"):
                spend(ledger, task=task, mechanism=mechanism)
        assert len(ledger.charges) == 1
        ledger.accept_clock(dt.datetime.now(dt.UTC))
        spend(ledger, task="statistics", mechanism="gaussian")


def test_accepted_clock_forgets_nothing_and_counts_what_was_ahead_for_a_day(
    path: Path, head: Path, monkeypatch: pytest.MonkeyPatch
):
    now = dt.datetime.now(dt.UTC)
    with clock_at(now - 2 * DAY, monkeypatch), open_ledger(path, head) as ledger:
        spend(ledger)
    with open_ledger(path, head) as ledger:
        write_at(ledger, now + 400 * DAY, monkeypatch)
        entry = ledger.accept_clock(now)
        assert (entry.kind, entry.fields["num_ahead"]) == ("clock", 2), "the charge and its commit"
        assert not ledger.is_clock_behind(now)
        assert ledger.total("a", 1e-5, epsilon_of).epsilon == 4.0
        assert ledger.num_since(now - DAY) == 1
        assert ledger.num_since(now + DAY) == 0
        with pytest.raises(InputError, match="nothing to accept"):
            ledger.accept_clock(now)
        write_at(ledger, now + 30 * DAY, monkeypatch)
        assert ledger.is_clock_behind(now), "a wrong clock once more is noticed once more"
    with open_ledger(path, head) as ledger:
        assert ledger.total("a", 1e-5, epsilon_of).epsilon == 6.0


def test_clock_that_was_accepted_ahead_and_then_set_right_is_accepted_again():
    start = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    days = ((0, "open"), (900, "reserve"), (300, "clock"), (1, "clock"), (2, "reserve"))
    entries = [Entry(number, start + dt.timedelta(days=day), kind, {}, "") for number, (day, kind) in enumerate(days)]
    history = History(entries)
    assert [(time - start).days for time in history.times] == [0, 1, 1, 1, 2]
    assert not history.is_clock_behind(start + dt.timedelta(days=2))


@pytest.mark.parametrize("name", ["head.json", "kept/elsewhere/head.json"])
def test_head_file_in_the_ledgers_folder_is_refused(path: Path, name: str):
    with pytest.raises(InputError, match="outside"), open_ledger(path, path.parent / name):
        pass
    assert not path.exists()
