"""What the operator has approved, and what waits."""

import os
from pathlib import Path

import pytest

from client.home import Home
from client.policy import approval
from client.policy.approval import Kind, approve, keep_pending, pending, read_approved, require_approved, revoke
from client.policy.refusals import RefusedError
from shared.errors import InputError
from shared.experiment.config import load_experiment
from shared.messages.training import experiment_digest
from tests.client.conftest import experiment

A, B = "a" * 64, "b" * 64


def test_nothing_is_approved_at_first(tmp_path: Path):
    found = read_approved(Home(tmp_path))
    assert found.code == found.experiments == frozenset()


def test_code_and_experiments_are_approved_apart(tmp_path: Path):
    home = Home(tmp_path)
    for _ in range(2):
        approve(home, "code", A)
        approve(home, "experiment", B)
    assert read_approved(home).code == {A}
    assert read_approved(home).experiments == {B}
    assert len(home.approved.read_text().splitlines()) == 2
    assert home.approved.stat().st_mode & 0o777 == 0o600


def test_approval_can_be_taken_back(tmp_path: Path):
    home = Home(tmp_path)
    approve(home, "code", A)
    assert revoke(home, A)
    assert not revoke(home, A)
    assert read_approved(home).code == frozenset()
    approve(home, "code", B)
    for part in ("", B[:10], "code"):
        assert not revoke(home, part)
    assert read_approved(home).code == {B}, "a part of a digest takes nothing back"


def test_approval_of_one_kind_is_none_of_another(make_site):
    home, settings = make_site(experiments="approved")
    kinds: tuple[Kind, ...] = ("experiment", "projection", "reference")
    for number, kind in enumerate(kinds):
        approve(home, kind, str(number) * 64)
    for number in range(3):
        for kind in kinds:
            if kind == kinds[number]:
                require_approved(home, settings, kind, str(number) * 64)
            else:
                with pytest.raises(RefusedError, match=f"has not approved the {kind} {number}"):
                    require_approved(home, settings, kind, str(number) * 64)


@pytest.mark.parametrize("digest", ["", "a" * 63, "g" * 64, "A" * 64, "a" * 64 + "\ncode " + "b" * 64])
def test_what_is_no_digest_is_refused(tmp_path: Path, digest: str):
    with pytest.raises(InputError, match="64 hexadecimal"):
        approve(Home(tmp_path), "code", digest)


def test_wrong_lines_and_modes_are_refused(tmp_path: Path):
    home = Home(tmp_path)
    approve(home, "code", A)
    home.approved.write_text("anything goes\n")
    with pytest.raises(InputError, match="line 1"):
        read_approved(home)
    home.approved.chmod(0o666)
    with pytest.raises(InputError, match="chmod 600"):
        read_approved(home)


def test_waiting_experiment_can_be_read_and_is_forgotten_when_approved(tmp_path: Path):
    home, plan = Home(tmp_path), experiment()
    keep_pending(home, plan, "trial")
    keep_pending(home, plan, "trial")
    (path,) = pending(home)
    assert load_experiment(path) == plan
    approve(home, "experiment", experiment_digest(plan))
    assert pending(home) == []


def test_waiting_experiments_cannot_fill_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(approval, "MOST_PENDING", 3)
    for seed in range(6):
        keep_pending(Home(tmp_path), experiment(train={"seed": seed}), "trial")
        path = approval.pending_file(Home(tmp_path), experiment_digest(experiment(train={"seed": seed})))
        os.utime(path, (seed, seed))
    kept = [load_experiment(path).train.seed for path in pending(Home(tmp_path))]
    assert kept == [5, 4, 3], "the newest stay, newest first"
