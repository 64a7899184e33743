"""An update or statistics made into what leaves: masked, its seeds shared among the peers; updates clipped before."""

import math
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.home import Home
from client.secure.run_state import RoundState, open_run
from shared.messages.training import RequestHeader
from shared.secure_aggregation.additive_masks import SEED_BYTES, Mask, masked, pairwise_mask
from shared.secure_aggregation.dealing import Dealing, deal
from shared.secure_aggregation.ring import Ring, ring_of
from shared.secure_aggregation.roster import Roster
from shared.secure_aggregation.round_keys import RoundKeys
from shared.updates.fixed_point import clipping, update_norm
from shared.updates.norm_bound import norm_bound


@dataclass(frozen=True)
class Place:
    """In which sum, and as whose."""

    roster: Roster
    run: str
    request_digest: str
    home: Home
    alias: str


def mask_update(
    update: NDArray[np.float32], header: RequestHeader, roster: Roster, request_digest: str, home: Home, alias: str
) -> tuple[NDArray[Any], Dealing]:
    """The masked update (num_elements,) and the shares that go with it; what nobody can check is done here.

    With 32 bits it lies where the update was.

    Raises:
        ValueError: the update is not finite: within a sum nobody would find whose it was.
        SecureSumError: this site has no key for the run, or a peer's is none.
    """
    norm = update_norm(update)
    if not math.isfinite(norm):
        raise ValueError("the update is not finite, so it is not put into a sum")
    factor = clipping(norm, norm_bound(header.experiment, len(update)))
    place = Place(roster, header.run, request_digest, home, alias)
    return mask_values(update, factor, ring_of(header.experiment, len(roster.members)), place)


def mask_values(
    values: NDArray[np.float32] | NDArray[np.float64], factor: float, ring: Ring, place: Place
) -> tuple[NDArray[Any], Dealing]:
    """`factor * values` (n,) as it leaves, and the shares that go with it.

    Raises:
        SecureSumError: this site has no key for the run, or a peer's is none.
    """
    with open_run(place.home, place.run) as state:
        keys = RoundKeys(state.key, place.roster, place.alias, place.request_digest)
    self_seed = os.urandom(SEED_BYTES)
    others = [number for number in range(len(place.roster.members)) if number != keys.number]
    masks = [Mask(1, self_seed), *(pairwise_mask(keys.number, other, keys.pair_seed(other)) for other in others)]
    return masked(values, factor, ring, masks), deal(keys, self_seed)


def remember_leaving(header: RequestHeader, request_digest: str, home: Home) -> None:
    """Note that a masked update leaves, before it does: no other one may in this round. Nothing without a roster."""
    if header.roster is None:
        return
    with open_run(home, header.run) as state:
        newest = state.newest
        if newest is None or newest.request_digest != request_digest:
            state.remember(
                RoundState(server_round=header.server_round, request_digest=request_digest, roster=header.roster)
            )
