"""What a coordinator may not ask of a site after a masked round, each refused with its own reason; and what it may."""

import copy
import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest

from client.records.chain import read_chain
from client.secure.run_state import RunState, open_run
from client.settings import load_settings, save_settings
from server.federation.secure.masked_sum import MaskedSum
from server.federation.secure.unmasking import Unmasking
from shared.secure_aggregation.additive_masks import Mask, add_masks, pairwise_mask
from shared.secure_aggregation.dealing import recover
from shared.secure_aggregation.roster import SecureSumError
from tests.client.secure.coordinator import Coordinator, peer
from tests.server.secure_sites import update_of

ALL = tuple(f"site-{number}" for number in range(5))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Coordinator]:
    """Five sites that have sent their masked updates, in `live`, and a copy of their folders in `kept`."""
    root = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASKFED_REGISTRY", str(root / "live" / "registry"))
        coordinator = Coordinator(root / "live")
        coordinator.train_all()
    shutil.copytree(root / "live", root / "kept", symlinks=True)
    return root, coordinator


@pytest.fixture
def asked(trained: tuple[Path, Coordinator], monkeypatch: pytest.MonkeyPatch) -> Coordinator:
    """These sites as they were before any question."""
    root, coordinator = trained
    shutil.rmtree(root / "live")
    shutil.copytree(root / "kept", root / "live", symlinks=True)
    monkeypatch.setenv("MASKFED_REGISTRY", str(root / "live" / "registry"))
    return copy.deepcopy(coordinator)


def first(coordinator: Coordinator):
    return coordinator.sites["site-0"]


def test_the_same_list_is_answered_the_same_way_again_over_restarts_and_no_other_one_is(asked):
    answer = asked.unmask(first(asked), ALL)
    assert answer.status == "unmasked"
    assert asked.unmask(first(asked), ALL) == answer
    for survivors in (ALL[:4], ALL[:3], (*ALL[:2], ALL[4])):
        refused = asked.unmask(first(asked), survivors)
        assert refused.refusal == "secure_sum" and "another list of survivors" in refused.reason
    # Boxes of the same list that were changed meanwhile make no other answer.
    assert asked.unmask(first(asked), ALL, boxes=("00" * 60,) * 5) == answer
    kinds = [entry.kind for entry in read_chain(first(asked).home.journal)]
    assert kinds.count("release") == 3 and kinds.count("refusal") == 3


@pytest.mark.parametrize(
    ("survivors", "changed", "reason"),
    [
        (ALL[1:], {}, "own update is not in the sum"),
        ((*ALL[:2], "site-9"), {"boxes": ("00" * 60,) * 3}, "site-9 is not in the roster"),
        (ALL, {"server_round": 2}, "nothing masked in round 2"),
        (ALL, {"request_digest": "ab" * 32}, "in round 1 went to another request"),
        (ALL, {"run": "other"}, "sent nothing masked in it"),
        (ALL, {"boxes": ("00" * 60,) * 5}, "the shares of site site-0 are not those that it dealt"),
    ],
    ids=["without itself", "a stranger", "another round", "another request", "another run", "made-up shares"],
)
def test_what_a_coordinator_may_not_ask_is_refused_and_costs_nothing(asked, survivors, changed, reason):
    refused = asked.unmask(first(asked), survivors, **changed)
    assert refused.refusal == "secure_sum" and reason in refused.reason
    assert asked.unmask(first(asked), ALL).status == "unmasked"


def test_questions_for_runs_that_nobody_knows_leave_no_folder(asked):
    """Each would hold a place on the disk, and among the runs whose keys are kept."""
    home = first(asked).home
    for number in range(20):
        assert asked.unmask(first(asked), ALL, run=f"other-{number}").refusal == "secure_sum"
    assert [path.name for path in home.secure_sums.iterdir()] == ["run"]
    assert asked.unmask(first(asked), ALL).status == "unmasked"


@pytest.mark.parametrize(("policy", "count"), [({}, 3), ({"min_peers": 5}, 5)])
def test_fewer_updates_than_policy_or_threshold_ask_for_are_not_opened(tmp_path, policy, count):
    coordinator = Coordinator(tmp_path, 6 if count == 3 else 5, **policy)
    coordinator.train_all()
    refused = coordinator.unmask(first(coordinator), ALL[: max(3, count - 1)])
    assert refused.refusal == "secure_sum" and f"this site asks for {max(4, count)}" in refused.reason


def test_shares_for_another_site_of_another_dealer_or_request_do_not_open(asked, tmp_path):
    right = asked.question(first(asked), ALL).boxes
    other = Coordinator(tmp_path / "other")
    other.train_all()
    wrong = {
        "for another site": asked.question(asked.sites["site-1"], ALL).boxes,
        "of another dealer": (right[1], right[0], *right[2:]),
        "of another run": other.question(first(other), ALL).boxes,
        "changed": (right[0], right[1][:-1] + ("0" if right[1][-1] != "0" else "1"), *right[2:]),
    }
    for boxes in wrong.values():
        refused = asked.unmask(first(asked), ALL, boxes=boxes)
        assert refused.refusal == "secure_sum" and "not those that it dealt to this site" in refused.reason


def test_an_older_round_is_not_opened_once_a_newer_one_has_begun(asked):
    old = asked.request
    before = asked.question(first(asked), ALL)
    asked.request = asked.training(2)
    asked.train(first(asked))
    asked.request = old
    refused = asked.unmask(first(asked), ALL, boxes=before.boxes)
    assert "a newer round has begun" in refused.reason


def test_sites_that_the_operator_has_taken_back_since_the_update_left_are_given_nothing(asked):
    home = first(asked).home
    settings_file = home.settings
    text = settings_file.read_text()
    settings_file.write_text(text.replace('rosters = "any"', 'rosters = "approved"'))
    assert asked.unmask(first(asked), ALL).refusal == "roster_not_approved"
    settings_file.write_text(text)
    assert asked.unmask(first(asked), ALL).status == "unmasked"


def test_a_damaged_memory_refuses_and_a_site_that_has_left_does_too(asked):
    home = first(asked).home
    file = home.secure_sums / "run" / "round.json"
    kept = file.read_bytes()
    file.write_bytes(kept[: len(kept) // 2])
    assert asked.unmask(first(asked), ALL).refusal == "failed"
    file.write_bytes(kept)
    assert file.stat().st_mode & 0o077 == 0 and (file.parent / "key").stat().st_mode & 0o077 == 0
    settings = load_settings(home)
    save_settings(home, settings.model_copy(update={"policy": settings.policy.model_copy(update={"tasks": ()})}))
    assert asked.unmask(first(asked), ALL).refusal == "task_not_allowed"


def test_an_answer_that_cannot_be_remembered_does_not_leave(asked, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunState, "remember", full)
    refused = asked.unmask(first(asked), ALL)
    assert refused.refusal == "disk_full" and not refused.shares


def test_a_home_that_was_put_back_from_a_backup_answers_no_second_list(asked, tmp_path):
    home, others = first(asked).home, ALL[:3]
    shutil.copytree(home.path, tmp_path / "backup")
    assert asked.unmask(first(asked), ALL).status == "unmasked"
    for backup in (tmp_path / "backup", None):
        shutil.rmtree(home.secure_sums if backup is None else home.path)
        if backup is not None:
            shutil.copytree(backup, home.path)
        refused = asked.unmask(first(asked), others)
        assert refused.refusal == "secure_sum" and "not its newest copy" in refused.reason
    with pytest.raises(SecureSumError, match="not its newest copy"), open_run(home, "run") as state:
        state.make_key()
        _ = state.newest
    assert "not its newest copy" in asked.ask_keys(first(asked), tuple(map(peer, ALL))).reason


def test_a_kill_between_memory_and_witness_gives_the_same_answer_and_a_backup_of_before_none(
    asked, tmp_path, monkeypatch
):
    home = first(asked).home
    shutil.copytree(home.path, tmp_path / "backup")
    with monkeypatch.context() as patched:
        patched.setattr(RunState, "_witness_that", lambda *_: 1 / 0)
        assert asked.unmask(first(asked), ALL).refusal == "failed"
    assert asked.unmask(first(asked), ALL).status == "unmasked"
    shutil.rmtree(home.path)
    shutil.copytree(tmp_path / "backup", home.path)
    assert "not its newest copy" in asked.unmask(first(asked), ALL[:3]).reason


def opened_update(asked: Coordinator, target: str) -> np.ndarray:
    """A coordinator that asks for two lists, one with the target and one without it, and puts the answers together."""
    roster, others = asked.roster, tuple(alias for alias in ALL if alias != target)
    number, dealing = roster.number_of(target), asked.replies[target].header.dealing
    assert dealing is not None
    own, masks = {}, []
    for alias in others:
        answer = asked.unmask(asked.sites[alias], ALL)
        if answer.shares:
            own[roster.number_of(alias)] = answer.revealed(ALL.index(target))[0]
    masks.append(Mask(-1, recover(dealing, number, own, target)))
    for place, alias in enumerate(others):
        towards = {}
        for site in others:
            answer = asked.unmask(asked.sites[site], others)
            if answer.shares:
                # The survivor's own seed comes first or last, the one towards the target beside it.
                seed = 0 if number < roster.number_of(alias) else 1
                towards[roster.number_of(site)] = answer.revealed(place)[seed]
        theirs = asked.replies[alias].header.dealing
        assert theirs is not None
        secret = recover(theirs, number, towards, alias)
        masks.append(Mask(-pairwise_mask(number, roster.number_of(alias), secret).sign, secret))
    total = MaskedSum.of(asked.request.header, roster)
    elements = asked.replies[target].update.copy()
    add_masks(elements, total.ring, masks)
    return total.ring.decode(elements)


def test_two_lists_would_open_one_update_were_they_both_answered(asked, monkeypatch):
    """The attack that the memory of one list forbids works without it, so the refusals above are what keeps it out."""
    target = "site-2"
    update = update_of(target, asked.request)
    ring = MaskedSum.of(asked.request.header, asked.roster).ring
    with monkeypatch.context() as patched:
        patched.setattr(RunState, "remember", lambda *_: None)
        assert opened_update(asked, target).tolist() == ring.decode(ring.encode(update, 1.0)).tolist()
    for site in asked.sites.values():
        assert asked.unmask(site, ALL).status == "unmasked"
    with pytest.raises(SecureSumError, match="another seed"):
        opened_update(asked, target)


@pytest.mark.parametrize("told", list(itertools.product((0, 1), repeat=4))[1::3])
def test_no_split_of_the_sites_opens_an_update(asked, told):
    """Each site answers whichever of two lists it is told first; one list at least stays below the threshold."""
    target, others = "site-2", tuple(alias for alias in ALL if alias != "site-2")
    for alias, which in zip(others, told, strict=True):
        asked.unmask(asked.sites[alias], (ALL, others)[which])
    asked.unmask(asked.sites[target], ALL)
    with pytest.raises(SecureSumError, match="another seed"):
        opened_update(asked, target)


def test_what_all_sites_give_back_opens_the_sum_and_leaves_every_single_update_masked(asked):
    total = MaskedSum.of(asked.request.header, asked.roster)
    for alias, reply in asked.replies.items():
        total.fold(alias, reply.update, reply.header.dealing)
    unmasking = Unmasking(total, asked.run, 1, asked.request.digest)
    given = {alias: unmasking.checked(alias, asked.unmask(site, ALL)) for alias, site in asked.sites.items()}
    masks = unmasking.masks(given)
    expected = sum(total.ring.decode(total.ring.encode(update_of(alias, asked.request), 1.0)) for alias in ALL)
    assert unmasking.open(masks).tolist() == list(expected)
    for alias, reply in asked.replies.items():
        single = reply.update.copy()
        add_masks(single, total.ring, masks[ALL.index(alias) : ALL.index(alias) + 1])
        assert np.abs(total.ring.decode(single)).max() > total.ring.largest_sum(5)


def test_the_journal_names_the_list_and_no_share(asked):
    answer = asked.unmask(first(asked), ALL)
    text = first(asked).home.journal.read_text()
    assert "shares of masks" in text and '"survivors"' in text
    assert not any(shares[:66] in text for shares in answer.shares)
