"""What masked updates cost beside open ones, by the product's own code: bytes, memory, seconds of rounds.

First in one process, with as many numbers as the model S has: what a site makes, stores and sends, and the
coordinator's part with nobody and with as many as possible dropped out. Then with real sites and the same model: open
and masked rounds in pairs (`secure_rounds`). `--parts` leaves one of the two out. Reached is what both say.
"""

import argparse
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from numpy.typing import NDArray

from benchmarks.local import make_experiment
from benchmarks.measure import verdict
from benchmarks.secure_rounds import Workload, compare
from client.records.replies import keep_reply
from server.federation.secure.masked_sum import MaskedSum
from server.federation.secure.unmasking import Shares, Unmasking
from shared.messages.packing import Manifest, TensorSpec, encode
from shared.messages.signature import public_text
from shared.messages.training import ReplyHeader, RequestHeader, TrainReply
from shared.secure_aggregation.additive_masks import SEED_BYTES, Mask, add_masks, masked, pairwise_mask
from shared.secure_aggregation.dealing import deal, open_box, revealed_seeds
from shared.secure_aggregation.ring import ring_of
from shared.secure_aggregation.roster import Member, Roster, sign_key, threshold_for
from shared.secure_aggregation.round_keys import RoundKeys
from shared.secure_aggregation.round_keys import public_text as agreement_text

S_NUMBERS = 44_290_000
NEEDED_BYTES = 1.05
"""Of an open float32 update, with 32 bits."""
NEEDED_GROWTH = 0.10
"""Of the coordinator's memory from 3 sites, the smallest sum, to 32."""
NEEDED_CHUNKS = 1.0
"""Of a site's memory beyond that for an open update and beyond what travels, in pieces of 8 MB."""
NEEDED_OVERHEAD = 0.10
"""Of a round's seconds, beside the question for masks."""
CHUNK_BYTES = 8 * 2**20
T = TypeVar("T")
DIGEST = "ab" * 32
PARTS = ("process", "rounds")


@dataclass(frozen=True)
class Party:
    """Everybody of one round: keys, roster, header."""

    header: RequestHeader
    roster: Roster
    keys: list[RoundKeys]


def main(arguments: Sequence[str] = ()) -> int:
    """Print the figures, then the verdict."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sites", type=int, default=5)
    parser.add_argument("--numbers", type=int, default=S_NUMBERS, help="of an update, in one process")
    parser.add_argument("--size", default="S", help="model of the rounds")
    parser.add_argument("--local-steps", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=3, help="an open and a masked run each")
    parser.add_argument("--bits", type=int, choices=(32, 64), default=32, help="of the rounds; 64 send twice the bytes")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    options = parser.parse_args(arguments)
    statuses = [in_one_process(options.sites, options.numbers)] if "process" in options.parts else []
    if "rounds" in options.parts:
        load = Workload(options.sites, options.size, options.local_steps, options.pairs, options.bits)
        statuses.append(in_rounds(load))
    return max(statuses)


def in_one_process(num_sites: int, numbers: int) -> int:
    """Seconds, bytes and memory of one site and of the coordinator."""
    ratio, chunks = {}, {}
    plain = site_peak(party(num_sites, numbers, 64), numbers, is_masked=False)
    for bits in (64, 32):
        made = party(num_sites, numbers, bits)
        # What travels is wider with 64 bits, which is no copy; where it is as wide it lies in the update's place.
        chunks[bits] = (
            site_peak(made, numbers, is_masked=True) - plain - (numbers * 8 if bits == 64 else 0)
        ) / CHUNK_BYTES
        seconds, sent = timed(lambda who=made: masked_by(who, update_of(numbers)))
        ratio[bits] = sent.nbytes / (numbers * 4)
        print(f"{bits} bits: {ratio[bits]:.3f} x the bytes of float32; a site needs {chunks[bits]:+.2f} chunks more")
        print(f"  {'mask':20s} {seconds:7.2f} s of processor")
        for gone in (0, num_sites - made.roster.threshold):
            print(f"  {f'unmask, {gone} gone':20s} {timed(prepared(made, gone))[0]:7.2f} s of processor")
    peaks = {count: coordinators_peak(count) for count in (3, 8, 32)}
    growth = max(peaks.values()) / min(peaks.values()) - 1
    print("coordinator's peak with 3, 8, 32 sites: " + ", ".join(f"{peak / 1e6:.0f} MB" for peak in peaks.values()))
    more = max(chunks.values())
    reached = ratio[32] <= NEEDED_BYTES and growth <= NEEDED_GROWTH and more <= NEEDED_CHUNKS
    figures = (
        f"bytes {ratio[32]:.2f} x float32 with 32 bits (limit {NEEDED_BYTES}), coordinator's memory +{growth:.1%} from "
        f"3 to 32 sites (limit {NEEDED_GROWTH:.0%}), a site {more:+.2f} chunks of 8 MB (limit {NEEDED_CHUNKS:g})"
    )
    return verdict(f"masked updates, {num_sites} sites, {numbers / 1e6:.1f} M numbers", figures, reached=reached)


def in_rounds(load: Workload) -> int:
    """Seconds of open and masked rounds of real sites."""
    found = compare(load)
    ratios = ", ".join(f"{ratio:.3f}" for ratio in found.ratios)
    figures = (
        f"a masked round takes {found.overhead:+.1%} beside its question for masks (pairs {ratios}; limit "
        f"{NEEDED_OVERHEAD:+.0%}), which takes {max(found.unmask_seconds):.1f} s at most, {found.num_left} processes "
        "left"
    )
    reached = found.overhead <= NEEDED_OVERHEAD and found.is_whole and not found.num_left
    name = f"masked rounds, {load.num_sites} real sites, model {load.size}, {load.local_steps} steps, {load.bits} bits"
    return verdict(name, figures, reached=reached)


def update_of(numbers: int) -> NDArray[np.float32]:
    """Some update."""
    return np.random.default_rng(0).standard_normal(numbers, np.float32)


def site_peak(who: Party, numbers: int, *, is_masked: bool) -> int:
    """Largest traced memory of a site that makes and stores what it sends, in bytes; the update itself is in it."""
    update = update_of(numbers)
    tracemalloc.start()
    sent = masked_by(who, update) if is_masked else encode(update, "float32")
    with tempfile.TemporaryDirectory(prefix="maskfed-") as folder:
        keep_reply(Path(folder), "run", TrainReply(ReplyHeader(request_digest=DIGEST, status="trained"), sent))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def party(num_sites: int, numbers: int, bits: int) -> Party:
    """A round of so many sites."""
    experiment = make_experiment(f"[federation]\nsecure = true\nsecure_bits = {bits}\n")
    pairs = {f"site-{number:02d}": X25519PrivateKey.generate() for number in range(num_sites)}
    roster = Roster(members=tuple(map(member, pairs, pairs.values())), threshold=threshold_for(num_sites, 0))
    manifest = Manifest(tensors=(TensorSpec(name="all", shape=(numbers,)),))
    header = RequestHeader(
        run="run", server_round=1, experiment=experiment, precision="float32", manifest=manifest, roster=roster
    )
    return Party(header, roster, [RoundKeys(key, roster, alias, DIGEST) for alias, key in pairs.items()])


def member(alias: str, key: X25519PrivateKey) -> Member:
    """A site's signed key."""
    signing, public = Ed25519PrivateKey.generate(), agreement_text(key)
    signature = sign_key(signing, "run", alias, public)
    return Member(alias=alias, signing_key=public_text(signing), public_key=public, signature=signature)


def masked_by(who: Party, update: NDArray[np.float32]) -> NDArray[Any]:
    """What the first site sends of an update, which is gone then."""
    keys = who.keys[0]
    masks = [Mask(1, bytes(32)), *(pairwise_mask(0, other, keys.pair_seed(other)) for other in range(1, len(who.keys)))]
    wire = masked(update, 1.0, ring_of(who.header.experiment, len(who.keys)), masks)
    deal(keys, bytes(32))
    return wire


def prepared(who: Party, gone: int) -> Callable[[], None]:
    """A masked sum of zeros, and what opens it: shares checked, seeds recovered, masks taken away."""
    total, there = MaskedSum.of(who.header, who.roster), len(who.keys) - gone
    for number in range(there):
        keys, seed = who.keys[number], bytes([number]) * SEED_BYTES
        # As a reply arrives, and goes: one is in memory at a time.
        reply = np.zeros(total.elements.shape, total.elements.dtype)
        total.fold(who.roster.aliases[number], reply, deal(keys, seed))
        # Masks between two that are there cancel.
        towards = (pairwise_mask(number, other, keys.pair_seed(other)) for other in range(there, len(who.keys)))
        add_masks(total.elements, total.ring, [Mask(1, seed), *towards])
    unmasking = Unmasking(total, who.header.run, 1, DIGEST)
    given = {
        who.roster.aliases[receiver]: shares_of(who, total, unmasking, receiver)
        for receiver in range(who.roster.threshold)
    }

    def opened() -> None:
        assert not unmasking.open(unmasking.masks(given)).any()

    return opened


def shares_of(who: Party, total: MaskedSum, unmasking: Unmasking, receiver: int) -> Shares:
    """What one survivor gives back."""
    found = Shares()
    for alias in unmasking.survivors:
        dealer = who.roster.number_of(alias)
        shares = open_box(who.keys[receiver], dealer, total.dealings[alias].boxes[receiver])
        found |= {(alias, seed): shares[seed] for seed in revealed_seeds(who.roster, unmasking.survivors, dealer)}
    return found


def coordinators_peak(num_sites: int) -> int:
    """Largest traced memory of the coordinator's part in bytes, with 4 M numbers."""
    who = party(num_sites, 4_000_000, 64)
    tracemalloc.start()
    prepared(who, 0)()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def timed(work: Callable[[], T]) -> tuple[float, T]:
    """Seconds of processor, and what came of it."""
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
