"""Secrets between sites: the same on both ends, another for each pair, direction and request, and nobody else's."""

import pytest

from shared.secure_aggregation.roster import SecureSumError
from shared.secure_aggregation.round_keys import RoundKeys
from tests.shared.secure_aggregation.parties import DIGEST, parties

NONCE = bytes(12)


def test_two_sites_derive_one_seed_and_every_pair_and_request_another():
    sites = parties(4)
    first, second, third, _ = sites.all()
    assert first.pair_seed(1) == second.pair_seed(0)
    found = {first.pair_seed(1), first.pair_seed(2), second.pair_seed(2), sites.of("site-00", "ab" * 32).pair_seed(1)}
    assert len(found) == 4
    assert third.pair_seed(0) in found


def test_a_box_opens_for_its_receiver_dealer_and_request_only():
    sites = parties(4)
    first, second, third, _ = sites.all()
    sealed = first.seal(1, NONCE, b"shares")
    assert second.open(0, sealed) == b"shares"
    assert first.open(0, first.seal(0, NONCE, b"own")) == b"own"
    later = sites.of("site-01", "ab" * 32)
    for keys, dealer, text in (
        (third, 0, sealed),
        (second, 2, sealed),
        (later, 0, sealed),
        (first, 1, sealed),
        (second, 0, sealed[:-1] + bytes([sealed[-1] ^ 1])),
        (second, 0, b""),
        (second, 0, sealed[:12]),
    ):
        with pytest.raises(SecureSumError, match="not those that it dealt to this site"):
            keys.open(dealer, text)


def test_a_key_that_agrees_on_nothing_is_refused():
    sites = parties(3)
    bad = sites.roster.members[1].model_copy(update={"public_key": "00" * 32})
    roster = sites.roster.model_copy(update={"members": (sites.roster.members[0], bad, sites.roster.members[2])})
    with pytest.raises(SecureSumError, match="the key of site site-01 in the roster is none"):
        RoundKeys(sites.keys["site-00"], roster, "site-00", DIGEST).pair_seed(1)
