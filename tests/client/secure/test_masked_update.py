"""A real round with a mask on: what leaves is the open update once its seeds are known, and nothing like it before."""

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from client.records.chain import read_chain
from client.records.ledger import read_ledger
from client.secure.masked_update import mask_update
from client.secure.rosters import answer_keys
from client.secure.run_state import open_run
from client.training_request import MASKED, handle
from shared.messages.secure_sum.key_question import KeysQuery, keys_record, read_keys_answer
from shared.messages.training import RequestHeader, TrainReply
from shared.secure_aggregation.additive_masks import Mask, add_masks, pairwise_mask
from shared.secure_aggregation.dealing import open_box, recover
from shared.secure_aggregation.ring import ring_of
from shared.secure_aggregation.roster import Peer, Roster
from shared.secure_aggregation.round_keys import RoundKeys
from shared.updates.fixed_point import SCALE_BITS, to_fixed_point
from tests.client.conftest import MakeSite, experiment, request_for
from tests.shared.secure_aggregation.parties import member
from tests.signing import public_of

FEDERATION = {"secure": True, "update_norm_action": "clip", "min_replies": 3, "max_update_norm": 0.0}
MASKED_PLAN, OPEN_PLAN = experiment(federation=FEDERATION), experiment(federation={"max_update_norm": 0.0})
OWN, OTHERS = "site0", ("site-1", "site-2")


@pytest.fixture
def joined(make_site: MakeSite):
    """A site, the roster that it is in, and the private keys of its two peers."""
    home, _ = make_site(secure={"rosters": "any"}, release_scalars=("loss",))
    keys = {alias: X25519PrivateKey.generate() for alias in OTHERS}
    peers = tuple(Peer(alias=alias, signing_key=public_of(alias)) for alias in (*OTHERS, OWN))
    own = read_keys_answer(answer_keys(keys_record(KeysQuery(run="run", peers=peers)), home)).member
    assert own is not None
    members = (*(member(alias, key) for alias, key in keys.items()), own)
    return home, Roster(members=members, threshold=2), keys


def test_a_masked_round_is_one_charge_one_reply_and_the_open_update_under_its_masks(joined):
    home, roster, keys = joined
    request = request_for(MASKED_PLAN, roster=roster)
    reply, again = (handle(request.to_record(), home) for _ in range(2))
    assert (reply.header.status, reply.header.scalars, reply.header.num_examples) == ("trained", {}, 1)
    assert reply.header == again.header and reply.update.tobytes() == again.update.tobytes()
    assert len(read_ledger(home.ledger).charges) == 1
    (release,) = (entry for entry in read_chain(home.journal) if entry.kind == "release")
    assert MASKED in release.fields["numbers"] and "update" not in release.fields["numbers"]
    travelled = TrainReply.from_record(reply.to_record(), request.header.manifest.num_elements, 8)
    assert travelled.update.dtype == np.uint64

    peers = [RoundKeys(keys[alias], roster, alias, request.digest) for alias in OTHERS]
    number, dealing = roster.number_of(OWN), reply.header.dealing
    shares = {each.number: open_box(each, number, dealing.boxes[each.number])[number] for each in peers}
    masks = [Mask(-1, recover(dealing, number, shares, OWN))]
    for each in peers:
        seed = each.pair_seed(number)
        masks.append(Mask(-pairwise_mask(number, each.number, seed).sign, seed))
    seen = travelled.update.copy()
    add_masks(seen, ring_of(MASKED_PLAN, 3), masks)
    opened = handle(request_for(OPEN_PLAN, run="open").to_record(), home)
    assert opened.header.dealing is None
    # The streams of a round follow run and round, so the open run trains on other draws of the same length.
    assert np.abs(seen.view(np.int64)).max() < 2**SCALE_BITS
    assert np.abs(opened.update).max() < 1
    assert np.abs(travelled.update.view(np.int64).astype(np.float64)).mean() > 2.0**60


def test_masking_clips_as_the_coordinator_would_and_cuts_nothing_else(joined):
    home, roster, keys = joined
    plan = experiment(federation={**FEDERATION, "max_update_norm": 1.0})
    header = request_for(plan, roster=roster).header
    update = np.random.default_rng(4).normal(size=header.manifest.num_elements).astype(np.float32)
    wire, dealing = mask_update(update, header, roster, "ab" * 32, home, OWN)
    with open_run(home, "run") as state:
        own = RoundKeys(state.key, roster, OWN, "ab" * 32)
    number = own.number
    masks = [Mask(-1, recover(dealing, number, {each: open_box(
        RoundKeys(keys[alias], roster, alias, "ab" * 32), number, dealing.boxes[each])[number]
        for each, alias in enumerate(OTHERS)}, OWN))]  # fmt: skip
    for other in (0, 1):
        masks.append(Mask(-pairwise_mask(number, other, own.pair_seed(other)).sign, own.pair_seed(other)))
    add_masks(wire, ring_of(plan, 3), masks)
    factor = (1 - 2**-20) / float(np.linalg.norm(update.astype(np.float64)))
    assert wire.view(np.int64).tolist() == to_fixed_point(update, factor, SCALE_BITS).tolist()


def test_an_update_that_is_not_finite_does_not_enter_a_sum(joined):
    home, roster, _ = joined
    header = request_for(MASKED_PLAN, roster=roster).header
    update = np.zeros(header.manifest.num_elements, np.float32)
    update[3] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        mask_update(update, header, roster, "ab" * 32, home, OWN)


def test_a_stored_reply_is_not_sent_once_the_sites_of_its_roster_are_taken_back(joined):
    home, roster, _ = joined
    request = request_for(MASKED_PLAN, roster=roster).to_record()
    assert handle(request, home).header.status == "trained"
    home.settings.write_text(home.settings.read_text().replace('rosters = "any"', 'rosters = "approved"'))
    assert handle(request, home).header.refusal == "roster_not_approved"


def test_a_round_that_the_roster_does_not_allow_is_not_charged(joined):
    home, roster, _ = joined
    members = (*roster.members[:2], roster.members[2].model_copy(update={"public_key": "ab" * 32}))
    for wrong in (None, Roster(members=members, threshold=2)):
        reply = handle(request_for(MASKED_PLAN, roster=wrong).to_record(), home)
        assert reply.header.refusal in ("malformed", "secure_sum")
    assert isinstance(request_for(MASKED_PLAN, roster=roster).header, RequestHeader)
    assert read_ledger(home.ledger).charges == []
