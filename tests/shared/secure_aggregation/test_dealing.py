"""Shares of a round's seeds: dealt to each site, given back for one list of survivors, and never both of one site."""

import itertools
import os

import pytest
from pydantic import ValidationError

from shared.secure_aggregation.dealing import Dealing, deal, is_dealt, open_box, recover, revealed_seeds
from shared.secure_aggregation.roster import SecureSumError
from shared.secure_aggregation.shamir import PRIME, SHARE_BYTES, element
from tests.shared.secure_aggregation.parties import parties


def test_a_threshold_of_peers_recovers_each_seed_of_a_dealer():
    sites = parties(5)
    keys, own = sites.all(), os.urandom(32)
    dealing = deal(keys[2], own)
    opened = [open_box(keys[receiver], 2, dealing.boxes[receiver]) for receiver in range(5)]
    for seed in range(5):
        expected = own if seed == 2 else keys[2].pair_seed(seed)
        for chosen in itertools.combinations(range(5), 3):
            shares = {receiver: opened[receiver][seed] for receiver in chosen}
            assert all(is_dealt(dealing, receiver, seed, share) for receiver, share in shares.items())
            assert recover(dealing, seed, shares, "site-02") == expected


def test_what_is_given_back_for_any_list_leaves_every_survivor_pair_and_every_other_sites_own_seed_closed():
    roster = parties(5).roster
    for survivors in (set(each) for count in (3, 4, 5) for each in itertools.combinations(roster.aliases, count)):
        given = {
            (dealer, seed)
            for dealer in survivors
            for seed in revealed_seeds(roster, survivors, roster.number_of(dealer))
        }
        for dealer, alias in itertools.product(survivors, roster.aliases):
            is_given = (dealer, roster.number_of(alias)) in given
            assert is_given == (dealer == alias or alias not in survivors)


def test_a_share_that_was_not_dealt_is_known_and_so_is_a_dealer_that_lies():
    sites = parties(3)
    keys = sites.all()
    dealing, other = deal(keys[0], bytes(32)), deal(keys[0], bytes(32))
    (own, *_), (foreign, *_) = (open_box(keys[1], 0, each.boxes[1]) for each in (dealing, other))
    assert is_dealt(dealing, 1, 0, own)
    shifted = ((element(own) + 1) % PRIME).to_bytes(SHARE_BYTES, "big")
    for wrong in (foreign, shifted, b"\xff" * SHARE_BYTES, b""):
        assert not is_dealt(dealing, 1, 0, wrong)
    assert not is_dealt(dealing, 2, 0, own) and not is_dealt(dealing, 1, 1, own)
    lying = dealing.model_copy(update={"seed_digests": other.seed_digests[::-1]})
    shares = {receiver: open_box(keys[receiver], 0, dealing.boxes[receiver])[0] for receiver in (1, 2)}
    with pytest.raises(SecureSumError, match="site site-00 has dealt shares of another seed than it says"):
        recover(lying, 0, shares, "site-00")
    with pytest.raises(SecureSumError, match="site-00 has dealt"):
        recover(dealing, 0, {1: shares[1]}, "site-00")


def test_shares_of_another_length_are_refused():
    sites = parties(3)
    keys = sites.all()
    box = keys[0].seal(1, bytes(12), b"too short").hex()
    with pytest.raises(SecureSumError, match="9 bytes of shares"):
        open_box(keys[1], 0, box)


def test_a_dealing_is_square_and_as_large_as_a_header_may_be():
    dealing = deal(parties(64).of("site-07"), bytes(32))
    fields = dealing.model_dump()
    assert len(dealing.model_dump_json()) < 700_000
    for name in ("boxes", "seed_digests", "share_digests"):
        with pytest.raises(ValidationError):
            Dealing.model_validate({**fields, name: fields[name][:-1]})
