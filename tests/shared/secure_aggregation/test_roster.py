"""Who is in a roster, by whose word, and how many answers read a sum."""

import itertools

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from pydantic import ValidationError

from shared.secure_aggregation.roster import Peer, Roster, SecureSumError, choice_in_words, threshold_for
from tests.shared.secure_aggregation.parties import RUN, member, parties
from tests.signing import public_of


def test_a_key_counts_only_as_its_site_signed_it_for_this_run():
    honest = member("site-00", X25519PrivateKey.generate())
    honest.check(RUN)
    other = member("site-01", X25519PrivateKey.generate())
    for changed in (
        {"public_key": other.public_key},
        {"signing_key": other.signing_key},
        {"alias": "site-01"},
        {"signature": other.signature},
        {"signing_key": "ff" * 32},
    ):
        with pytest.raises(SecureSumError, match="not signed by it"):
            honest.model_copy(update=changed).check(RUN)
    with pytest.raises(SecureSumError, match="not signed by it"):
        honest.check("another-run")


def test_five_sites_stand_two_drop_outs_or_one_with_a_colluding_site():
    assert [threshold_for(5, colluding) for colluding in (0, 1, 2, 3)] == [3, 4, 4, 5]
    assert [threshold_for(count, 0) for count in (3, 4, 64)] == [2, 3, 33]


def test_a_choice_is_told_in_words_and_so_is_one_that_hides_nobody():
    assert "each takes 3 answers, so a round stands 2 that drop out, and 0 that work" in choice_in_words(5, 0)
    assert "each takes 4 answers, so a round stands 1 that drop out, and 1 that work" in choice_in_words(5, 1)
    assert "a sum would hide nobody, at least 6 sites are needed" in choice_in_words(5, 4)
    assert "a sum would hide nobody, at least 3 sites are needed" in choice_in_words(2, 0)
    for count, colluding in itertools.product(range(2, 12), range(12)):
        hides_two = count >= 3 and count - colluding >= 2
        assert ("each takes" in choice_in_words(count, colluding)) == hides_two
        assert threshold_for(count, colluding) <= count or not hides_two


@pytest.mark.parametrize("count", range(3, 8))
def test_no_split_of_honest_sites_gives_two_lists_enough_answers(count):
    """Brute force: honest sites answer one of two lists, colluding ones both."""
    for colluding in range(count - 1):
        threshold = threshold_for(count, colluding)
        for told in itertools.product((0, 1), repeat=count - colluding):
            answers = [told.count(number) + colluding for number in (0, 1)]
            assert min(answers) < threshold
        weaker = [told + colluding for told in ((count - colluding) // 2, (count - colluding + 1) // 2)]
        assert min(weaker) >= threshold - 1


def test_a_roster_names_each_site_and_key_once_by_alias_and_needs_more_than_half():
    roster = parties().roster
    fields = roster.model_dump()
    assert Roster.model_validate(fields) == roster
    members = fields["members"]
    for changed in (
        {"members": members[::-1]},
        {"members": [members[0], *members]},
        {"members": [members[0], {**members[1], "public_key": members[0]["public_key"]}, *members[2:]]},
        {"members": [members[0], {**members[1], "signing_key": members[0]["signing_key"]}, *members[2:]]},
        {"members": members[:2], "threshold": 2},
        {"threshold": 2},
        {"threshold": 6},
    ):
        with pytest.raises(ValidationError):
            Roster.model_validate({**fields, **changed})


def test_a_stranger_has_no_number():
    with pytest.raises(SecureSumError, match="site-99 is not in the roster"):
        parties().roster.number_of("site-99")


def test_what_is_approved_names_site_and_key():
    peers = [Peer(alias=alias, signing_key=public_of(key)) for alias, key in (("a", "a"), ("a", "b"), ("b", "a"))]
    assert len({peer.digest for peer in peers}) == 3
