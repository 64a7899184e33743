"""What a site deals with its masked update: shares of each of its seeds of the round, sealed for each site.

Seed number i of a site is the one that it shares with site i of the roster, its own place is the seed of its own mask.
Its peers can give back either: the own one of a site whose update is in the sum, or those towards sites whose update
is not. Digests of seeds and shares let whoever adds up see which answer is wrong.
"""

import hashlib
import os
from collections.abc import Collection, Mapping
from typing import Annotated, Self

from pydantic import Field, model_validator

from shared.experiment.config import Section
from shared.secure_aggregation.additive_masks import seed_digest
from shared.secure_aggregation.roster import MAX_SITES, MIN_SITES, Hex32, Roster, SecureSumError
from shared.secure_aggregation.round_keys import NONCE_BYTES, TAG_BYTES, RoundKeys
from shared.secure_aggregation.shamir import SHARE_BYTES, ShareError, combine, element, split

_MOST_DIGITS = 2 * (MAX_SITES * SHARE_BYTES + NONCE_BYTES + TAG_BYTES)
Box = Annotated[str, Field(pattern=r"^([0-9a-f]{2})+$", max_length=_MOST_DIGITS)]
"""Sealed shares, hexadecimal."""


class Dealing(Section):
    """One site's, in the order of the roster."""

    boxes: tuple[Box, ...] = Field(min_length=MIN_SITES, max_length=MAX_SITES)
    """For each site its share of every seed, sealed."""
    seed_digests: tuple[Hex32, ...] = Field(min_length=MIN_SITES, max_length=MAX_SITES)
    share_digests: tuple[tuple[Hex32, ...], ...] = Field(min_length=MIN_SITES, max_length=MAX_SITES)
    """For each site those of its shares, by seed."""

    @model_validator(mode="after")
    def _square(self) -> Self:
        count = len(self.boxes)
        if {len(self.seed_digests), len(self.share_digests), *map(len, self.share_digests)} != {count}:
            raise ValueError("a dealing has as many boxes, seeds and shares as sites")
        return self


def deal(keys: RoundKeys, self_seed: bytes) -> Dealing:
    """Share the seeds of a round among all sites of the roster, the dealer included.

    Args:
        keys: the dealer's.
        self_seed: 32 fresh random bytes.
    """
    count, threshold = len(keys.roster.members), keys.roster.threshold
    seeds = [self_seed if other == keys.number else keys.pair_seed(other) for other in range(count)]
    shares = [split(seed, count, threshold) for seed in seeds]
    dealt = [[of_seed[receiver] for of_seed in shares] for receiver in range(count)]
    boxes = (keys.seal(receiver, os.urandom(NONCE_BYTES), b"".join(own)) for receiver, own in enumerate(dealt))
    return Dealing(
        boxes=tuple(box.hex() for box in boxes),
        seed_digests=tuple(map(seed_digest, seeds)),
        share_digests=tuple(tuple(map(share_digest, own)) for own in dealt),
    )


def open_box(keys: RoundKeys, dealer: int, box: str) -> list[bytes]:
    """The shares that the site at `dealer` has dealt to this one, by seed.

    Raises:
        SecureSumError: they are not its shares for this site and request.
    """
    text, count = keys.open(dealer, bytes.fromhex(box)), len(keys.roster.members)
    if len(text) != count * SHARE_BYTES:
        raise SecureSumError(f"site {keys.roster.aliases[dealer]} has dealt {len(text)} bytes of shares")
    return [text[start : start + SHARE_BYTES] for start in range(0, len(text), SHARE_BYTES)]


def revealed_seeds(roster: Roster, survivors: Collection[str], dealer: int) -> list[int]:
    """Which seeds of a dealer its peers give back once the survivors are known, and no others.

    Its own one, for its update is in the sum, and those towards sites whose update is not. What it shares with another
    survivor is never given back: those masks cancel.
    """
    return [number for number, alias in enumerate(roster.aliases) if number == dealer or alias not in survivors]


def share_digest(share: bytes) -> str:
    """What a dealer says of a share, hexadecimal."""
    return hashlib.sha256(b"maskfed share 1" + share).hexdigest()


def is_dealt(dealing: Dealing, receiver: int, seed: int, share: bytes) -> bool:
    """Whether a revealed share is the one that was dealt."""
    try:
        element(share)
    except ShareError:
        return False
    return share_digest(share) == dealing.share_digests[receiver][seed]


def recover(dealing: Dealing, seed: int, shares: Mapping[int, bytes], dealer: str) -> bytes:
    """A seed from shares that were dealt, by receiver.

    Raises:
        SecureSumError: the dealer has dealt shares of another seed than it said, which is nobody else's fault.
    """
    try:
        found = combine(shares)
    except ShareError:
        found = b""
    if seed_digest(found) != dealing.seed_digests[seed]:
        raise SecureSumError(f"site {dealer} has dealt shares of another seed than it says")
    return found
