"""The coordinator's whole view of a round, for every list of survivors: it could be made up from the sum alone.

What a coordinator holds of each site is a masked update, less every mask that it may ask for. These rests must be
uniform on the ring, and so must every sum of some of them, but for the sum of all survivors: then whoever knows that
sum alone draws the same view. Bits are counted against Hoeffding's bound, so that a uniform view fails with less than
1e-9.
"""

import itertools
import math

import numpy as np
import pytest

from client.secure.run_state import ROUND_FILE, RunState, witnesses
from server.federation.secure.masked_sum import MaskedSum
from shared.secure_aggregation.additive_masks import Mask, add_masks, pairwise_mask
from shared.secure_aggregation.dealing import recover, revealed_seeds
from shared.secure_aggregation.roster import SecureSumError
from tests.client.secure.coordinator import Coordinator
from tests.server.secure_sites import update_of

ALL = tuple(f"site-{number}" for number in range(5))
LISTS = [list(each) for count in (3, 4, 5) for each in itertools.combinations(ALL, count)]
NUM_ELEMENTS = 1500
NUM_COUNTS = 64 * len(LISTS) * 2**5
"""Frequencies of single bits that are looked at, at most."""
MOST_OFF = math.sqrt(math.log(2 * NUM_COUNTS / 1e-10) / (2 * NUM_ELEMENTS))
"""Hoeffding: P(|mean - 1/2| >= d) <= 2 exp(-2 n d^2) for each of them, all together below 1e-10."""


class View:
    """What is left of each site's masked update once all that is given back for a list is taken away."""

    def __init__(self, coordinator, survivors, rests):
        self.ring = MaskedSum.of(coordinator.request.header, coordinator.roster).ring
        self.survivors, self.rests = survivors, rests

    def problem(self, total):
        """Why the view tells more than `total`, the open sum of the survivors; empty: it does not."""
        if self.ring.decode(sum(self.rests[alias] for alias in self.survivors)).tolist() != total.tolist():
            return "the survivors' rests are not their sum"
        for count in range(1, len(self.rests) + 1):
            for chosen in itertools.combinations(sorted(self.rests), count):
                is_whole = set(self.survivors) <= set(chosen)
                some = sorted(set(chosen) - set(self.survivors)) if is_whole else chosen
                if some and not is_uniform(sum(self.rests[alias] for alias in some)):
                    return f"the sum of the rests of {', '.join(some)} is not uniform"
        return ""


def is_uniform(elements):
    bits = np.unpackbits(elements.view(np.uint8).reshape(len(elements), -1), axis=1).mean(axis=0)
    return bool((np.abs(bits - 0.5) < MOST_OFF).all())


def view_of(coordinator, survivors):
    """All answers to a list, and all that follows from them."""
    roster = coordinator.roster
    given = {alias: coordinator.unmask(coordinator.sites[alias], tuple(survivors)) for alias in survivors}
    rests = {alias: reply.update.copy() for alias, reply in coordinator.replies.items()}
    ring = MaskedSum.of(coordinator.request.header, roster).ring
    for place, dealer in enumerate(survivors):
        own = roster.number_of(dealer)
        for index, seed in enumerate(revealed_seeds(roster, survivors, own)):
            shares = {roster.number_of(site): answer.revealed(place)[index] for site, answer in given.items()
                      if answer.shares}  # fmt: skip
            secret = recover(coordinator.replies[dealer].header.dealing, seed, shares, dealer)
            added = Mask(1, secret) if seed == own else pairwise_mask(own, seed, secret)
            add_masks(rests[dealer], ring, [Mask(-added.sign, secret)])
            if seed != own:
                # The same keystream is in the other site's update, too.
                add_masks(rests[roster.aliases[seed]], ring, [Mask(added.sign, secret)])
    return View(coordinator, survivors, rests)


def simulated(coordinator, survivors, total):
    """A view made from the sum alone, by somebody who has no update, no seed and no key."""
    ring = MaskedSum.of(coordinator.request.header, coordinator.roster).ring
    random = np.random.default_rng(5)
    rests = {alias: random.integers(0, 2**64, NUM_ELEMENTS, np.uint64).astype(ring.dtype) for alias in ALL}
    last = survivors[-1]
    rests[last] = total.astype("<i8").view(ring.dtype) - sum(rests[alias] for alias in survivors[:-1])
    return View(coordinator, survivors, rests)


def open_sum(coordinator, survivors):
    ring = MaskedSum.of(coordinator.request.header, coordinator.roster).ring
    return sum(ring.decode(ring.encode(update_of(alias, coordinator.request), 1.0)) for alias in survivors)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Five sites that have sent their masked updates, as they are before anybody asks for masks."""
    coordinator = Coordinator(tmp_path_factory.mktemp("view"), num_elements=NUM_ELEMENTS)
    coordinator.train_all()
    homes = [site.home for site in coordinator.sites.values()]
    files = [file for home in homes for file in (home.secure_sums / "run" / ROUND_FILE, witnesses(home) / "run")]
    return coordinator, {file: file.read_bytes() for file in files}


@pytest.fixture
def asked(trained):
    coordinator, kept = trained
    for file, content in kept.items():
        file.write_bytes(content)
    return coordinator


@pytest.mark.parametrize("survivors", LISTS, ids=lambda each: "".join(alias[-1] for alias in each))
def test_for_every_list_the_view_is_as_one_made_up_from_the_sum_alone(asked, survivors):
    total = open_sum(asked, survivors)
    assert view_of(asked, survivors).problem(total) == ""
    assert simulated(asked, survivors, total).problem(total) == ""


def test_with_the_memory_of_one_list_off_a_second_one_opens_an_update_and_the_view_shows_it(asked, monkeypatch):
    monkeypatch.setattr(RunState, "remember", lambda *_: None)
    both = list(ALL), [alias for alias in ALL if alias != "site-2"]
    every, others = (view_of(asked, survivors) for survivors in both)
    total = open_sum(asked, ALL)
    # Its own seed is known from the one list, the seeds towards the others from the other one.
    own = every.rests["site-2"] - asked.replies["site-2"].update
    rest = others.rests["site-2"] + own
    assert every.ring.decode(rest).tolist() == open_sum(asked, ["site-2"]).tolist()
    assert View(asked, list(ALL), {**every.rests, "site-2": rest}).problem(total)
    assert not is_uniform(rest)


def test_with_it_on_the_second_list_gives_nothing(asked):
    view_of(asked, list(ALL))
    with pytest.raises(SecureSumError, match="another seed"):
        view_of(asked, [alias for alias in ALL if alias != "site-2"])
