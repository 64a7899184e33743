"""Shares against an independent solver of linear equations, and what fewer of them tell."""

import contextlib
import itertools
import secrets
from collections import Counter

import pytest

from shared.secure_aggregation import shamir
from shared.secure_aggregation.shamir import PRIME, SHARE_BYTES, ShareError, combine, element, split

SECRET = bytes(range(7, 39))


def solved(shares, prime):
    """The constant coefficient of the polynomial through the shares, by Gaussian elimination over the field."""
    rows = [
        [pow(number + 1, power, prime) for power in range(len(shares))] + [int.from_bytes(share, "big")]
        for number, share in shares.items()
    ]
    for column in range(len(rows)):
        pivot = next(row for row in range(column, len(rows)) if rows[row][column])
        rows[column], rows[pivot] = rows[pivot], rows[column]
        inverse = pow(rows[column][column], prime - 2, prime)
        rows[column] = [value * inverse % prime for value in rows[column]]
        for row in range(len(rows)):
            if row != column:
                factor = rows[row][column]
                rows[row] = [(a - factor * b) % prime for a, b in zip(rows[row], rows[column], strict=True)]
    return rows[0][-1]


def test_the_field_is_one_and_holds_every_seed():
    assert PRIME > 2**256
    assert all(pow(base, PRIME - 1, PRIME) == 1 for base in (2, 3, 65537))
    assert (PRIME - 1).bit_length() <= 8 * SHARE_BYTES


@pytest.mark.parametrize("secret", [SECRET, bytes(32), b"\xff" * 32])
def test_any_threshold_of_shares_gives_the_seed_as_a_solver_finds_it(secret):
    shares = split(secret, 5, 3)
    for chosen in itertools.combinations(range(5), 3):
        some = {number: shares[number] for number in chosen}
        assert combine(some) == secret == solved(some, PRIME).to_bytes(32, "big")
    assert combine(dict(enumerate(shares))) == secret


def test_fewer_shares_than_the_threshold_fit_every_secret_equally_often(monkeypatch):
    """Over a small field, all polynomials: each share alone is uniform whatever the secret."""
    monkeypatch.setattr(shamir, "PRIME", 11)
    for secret in (0, 4):
        values = Counter()
        for coefficient in range(11):
            monkeypatch.setattr(secrets, "randbelow", lambda _, value=coefficient: value)
            shares = split(secret.to_bytes(32, "big"), 3, 2)
            values.update((number, shares[number]) for number in range(3))
        assert set(values.values()) == {1} and len(values) == 33


def test_a_changed_share_gives_another_seed_and_one_outside_of_the_field_is_refused():
    shares = dict(enumerate(split(SECRET, 4, 2)))
    shares[1] = ((element(shares[1]) + 1) % PRIME).to_bytes(SHARE_BYTES, "big")
    with contextlib.suppress(ShareError):  # what is beyond 2^256 is no seed
        assert combine({0: shares[0], 1: shares[1]}) != SECRET
    for bad in (b"\xff" * SHARE_BYTES, b"", bytes(32)):
        with pytest.raises(ShareError):
            combine({0: shares[0], 2: bad})
    with pytest.raises(ShareError):
        combine({})


@pytest.mark.parametrize(("secret", "count", "threshold"), [(bytes(31), 3, 2), (SECRET, 3, 4), (SECRET, 3, 0)])
def test_what_is_no_sharing_is_refused(secret, count, threshold):
    with pytest.raises(ValueError, match="not a sharing"):
        split(secret, count, threshold)
