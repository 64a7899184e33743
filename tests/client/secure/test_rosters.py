"""With whom a site adds up: invented, exchanged and unknown sites are refused before anything is trained."""

import itertools

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from client.policy.approval import approve, read_approved
from client.policy.refusals import RefusedError
from client.secure.rosters import find_pending, pending_rosters
from client.secure.run_state import MOST_RUNS
from shared.errors import InputError
from shared.secure_aggregation.roster import Roster, SecureSumError, sign_key
from shared.secure_aggregation.round_keys import public_text
from tests.client.secure.coordinator import Coordinator, peer
from tests.shared.secure_aggregation.parties import member
from tests.signing import key_of, public_of

ALL = tuple(f"site-{number}" for number in range(5))


def first(coordinator):
    return coordinator.sites["site-0"]


def changed(roster: Roster, number: int, **fields) -> Roster:
    members = list(roster.members)
    members[number] = members[number].model_copy(update=fields)
    return Roster.model_validate({"members": members, "threshold": roster.threshold})


def test_a_site_gives_one_key_a_run_and_another_in_the_next(tmp_path):
    coordinator = Coordinator(tmp_path)
    peers = tuple(map(peer, ALL))
    again = coordinator.ask_keys(first(coordinator), peers).member
    assert again == coordinator.roster.members[0]
    other = coordinator.ask_keys(first(coordinator), peers, "next").member
    assert other.public_key != again.public_key
    other.check("next")
    with pytest.raises(SecureSumError):
        other.check("run")


def test_a_coordinator_that_exchanges_or_invents_a_key_is_refused(tmp_path):
    coordinator = Coordinator(tmp_path)
    roster, mine = coordinator.roster, X25519PrivateKey.generate()
    signature = sign_key(key_of("coordinator"), "run", "site-3", public_text(mine))
    old = member("site-3", mine, "an earlier run")
    for wrong in (
        changed(roster, 3, public_key=public_text(mine)),
        changed(roster, 3, public_key=public_text(mine), signature=signature),
        changed(roster, 3, **old.model_dump()),
    ):
        with pytest.raises(SecureSumError, match="site-3 in the roster is not signed by it for this run"):
            coordinator.train(first(coordinator), coordinator.training(1, wrong))
    swapped = changed(roster, 0, public_key=public_text(mine))
    with pytest.raises(SecureSumError, match="other keys of this site"):
        coordinator.train(first(coordinator), coordinator.training(1, swapped))
    without = Roster(members=roster.members[1:], threshold=3)
    with pytest.raises(SecureSumError, match="site-0 is not in the roster"):
        coordinator.train(first(coordinator), coordinator.training(1, without))


def test_sites_that_the_operator_does_not_know_wait_for_approval(tmp_path):
    """Puppets with keys of their own sign everything right; only the operator can tell that they are no sites."""
    coordinator = Coordinator(tmp_path)
    cautious = Coordinator.__new__(Coordinator)
    cautious.__dict__ |= coordinator.__dict__
    site = type(first(coordinator))(tmp_path / "cautious", "site-0", rosters="approved")
    peers = tuple(map(peer, ALL))
    refused = coordinator.ask_keys(site, peers)
    assert refused.refusal == "roster_not_approved" and "site-1, site-2, site-3, site-4" in refused.reason
    assert [path.stem for path in pending_rosters(site.home)] == ["run"]
    assert find_pending(site.home, "run") == list(peers)
    for known in peers[1:4]:
        approve(site.home, "peer", known.digest)
    assert "site-4 yet" in coordinator.ask_keys(site, peers).reason
    assert coordinator.ask_keys(site, peers[:4]).status == "accepted"
    puppet = peers[3].model_copy(update={"signing_key": public_of("puppet")})
    assert coordinator.ask_keys(site, (*peers[:3], puppet)).refusal == "roster_not_approved"
    assert read_approved(site.home).peers == {known.digest for known in peers[1:4]}
    with pytest.raises(InputError, match="waiting are run"):
        find_pending(site.home, "another")


def test_puppets_in_the_roster_of_a_round_are_refused_too(tmp_path):
    coordinator = Coordinator(tmp_path, rosters="any")
    site = first(coordinator)
    settings_file = site.home.settings
    settings_file.write_text(settings_file.read_text().replace('rosters = "any"', 'rosters = "approved"'))
    with pytest.raises(RefusedError, match="does not know site-1, site-2, site-3, site-4 yet"):
        coordinator.train(site)


def test_a_roster_without_this_site_or_with_too_few_gets_no_key(tmp_path):
    coordinator = Coordinator(tmp_path, min_peers=4)
    peers = tuple(map(peer, ALL))
    assert "does not name this site" in coordinator.ask_keys(first(coordinator), peers[1:]).reason
    wrong_key = peers[0].model_copy(update={"signing_key": public_of("somebody")})
    assert "does not name this site" in coordinator.ask_keys(first(coordinator), (wrong_key, *peers[1:])).reason
    assert "3 sites in the sum, this site asks for 4" in coordinator.ask_keys(first(coordinator), peers[:3]).reason


def test_a_threshold_below_what_the_policy_counts_with_is_refused(tmp_path):
    coordinator = Coordinator(tmp_path, max_colluding=1)
    with pytest.raises(SecureSumError, match="3 answers of 5 sites read the sum, this site asks for 4"):
        coordinator.train(first(coordinator))
    higher = Roster(members=coordinator.roster.members, threshold=4)
    coordinator.train(first(coordinator), coordinator.training(1, higher))


def test_one_masked_update_leaves_in_a_round_and_the_roster_stays(tmp_path):
    coordinator = Coordinator(tmp_path)
    site = first(coordinator)
    coordinator.train(site, coordinator.training(2))
    for request, reason in (
        (coordinator.training(2, shift=1.0), "masked update of round 2 to another request"),
        (coordinator.training(2), "is gone and not made twice"),
        (coordinator.training(1), "round 1 is over"),
        (coordinator.training(3, Roster(members=coordinator.roster.members[:4], threshold=3)), "has changed"),
    ):
        with pytest.raises(SecureSumError, match=reason):
            coordinator.train(site, request)
    coordinator.train(site, coordinator.training(3))


def test_a_roster_goes_with_secure_and_only_with_it(tmp_path):
    coordinator = Coordinator(tmp_path)
    header = coordinator.request.header
    open_plan = header.experiment.model_copy(
        update={"federation": header.experiment.federation.model_copy(update={"secure": False})}
    )
    for update in ({"roster": None}, {"experiment": open_plan}):
        request = coordinator.training(1)
        request.header = header.model_copy(update=update)
        with pytest.raises(RefusedError, match=r"a roster goes with federation\.secure"):
            coordinator.train(first(coordinator), request)


def test_a_run_whose_key_is_gone_is_over_for_the_site_and_old_runs_are_forgotten(tmp_path):
    coordinator = Coordinator(tmp_path)
    site, peers = first(coordinator), tuple(map(peer, ALL))
    for number in range(MOST_RUNS):
        coordinator.ask_keys(site, peers, f"later-{number}")
    names = {path.name for path in site.home.secure_sums.iterdir()}
    assert len(names) == MOST_RUNS and "run" not in names
    with pytest.raises(SecureSumError, match="no key for the secure sums of this run"):
        coordinator.train(site)


def test_all_sites_of_a_roster_derive_the_same_request_digest_and_distinct_keys(tmp_path):
    members = Coordinator(tmp_path).roster.members
    assert all(one.public_key != other.public_key for one, other in itertools.combinations(members, 2))
