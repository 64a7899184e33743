"""What masked updates cost beside open ones, by the product's own code: processor seconds, bytes and memory.

By default in one process, with as many numbers as the model S has: a site's making of what it sends, the coordinator's
sum, and the removal of the masks with nobody and with as many as possible dropped out. `--federation` runs both kinds
of a run with real sites instead, by the operators' commands: rosters are approved, and one site's machine is gone from
the second round on.
"""

import argparse
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from numpy.typing import NDArray

from benchmarks.local import LocalFederation, federation, make_experiment, random_checkpoint, tiny_experiment
from benchmarks.measure import verdict
from server.federation.secure.masked_sum import MaskedSum
from server.federation.secure.unmasking import Shares, Unmasking
from server.runs.run_directory import RunDir
from shared.experiment.config import Experiment
from shared.messages.packing import Manifest, TensorSpec, encode
from shared.messages.signature import public_text
from shared.messages.training import RequestHeader
from shared.secure_aggregation.dealing import deal, open_box, revealed_seeds
from shared.secure_aggregation.masks import SEED_BYTES, Mask, add_masks, masked, pairwise_mask
from shared.secure_aggregation.ring import ring_of
from shared.secure_aggregation.roster import Member, Roster, sign_key, threshold_for
from shared.secure_aggregation.round_keys import RoundKeys
from shared.secure_aggregation.round_keys import public_text as agreement_text
from shared.storage.runlog import read_metrics

S_NUMBERS = 44_290_000
NEEDED_BYTES = 1.05
"""Of an open float32 update, with 32 bits."""
NEEDED_GROWTH = 0.10
"""Of the coordinator's memory from 2 or 3 sites to 32."""
NEEDED_CHUNKS = 4.0
"""Temporaries of a site's masking, in pieces of 8 MB; the masked update itself is what travels."""
CHUNK_BYTES = 8 * 2**20
T = TypeVar("T")
DIGEST = "ab" * 32
SECURE = {"secure": "true", "min_replies": 3}


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
    parser.add_argument("--numbers", type=int, default=S_NUMBERS, help="of an update")
    parser.add_argument("--federation", action="store_true", help="real sites, a tiny model")
    options = parser.parse_args(arguments)
    if options.federation:
        return with_processes(options.sites)
    return in_one_process(options.sites, options.numbers)


def in_one_process(num_sites: int, numbers: int) -> int:
    """Seconds, bytes and memory of one site and of the coordinator."""
    ratio, seconds = {}, {}
    for bits in (64, 32):
        made = party(num_sites, numbers, bits)
        update = np.random.default_rng(0).normal(scale=0.01, size=numbers).astype(np.float32)
        seconds["open", bits], wire = timed(lambda given=update: encode(given, "float32"))
        seconds["mask", bits], (sent, chunks) = timed(lambda who=made, given=update: sent_by(who, given))
        ratio[bits] = sent.nbytes / wire.nbytes
        for gone in (0, num_sites - made.roster.threshold):
            seconds[f"unmask, {gone} gone", bits], _ = timed(prepared(made, gone))
        print(f"{bits} bits: {ratio[bits]:.3f} x the bytes of float32; a site's temporaries {chunks:.1f} chunks")
        for name, value in ((name, value) for (name, each), value in seconds.items() if each == bits):
            print(f"  {name:20s} {value:7.2f} s of processor")
    peaks = {count: coordinators_peak(count) for count in (3, 8, 32)}
    growth = max(peaks.values()) / min(peaks.values()) - 1
    print("coordinator's peak with 3, 8, 32 sites: " + ", ".join(f"{peak / 1e6:.0f} MB" for peak in peaks.values()))
    reached = ratio[32] <= NEEDED_BYTES and growth <= NEEDED_GROWTH and chunks <= NEEDED_CHUNKS
    site, server = seconds["mask", 64] - seconds["open", 64], seconds["unmask, 0 gone", 64]
    figures = (
        f"{site:.1f} s more a site, {server:.1f} s at the coordinator (64 bits, of processor); bytes {ratio[32]:.2f} x "
        f"with 32 bits (limit {NEEDED_BYTES}), coordinator's memory +{growth:.0%} from 3 to 32 sites (limit "
        f"{NEEDED_GROWTH:.0%}), a site's temporaries {chunks:.1f} chunks (limit {NEEDED_CHUNKS:g})"
    )
    return verdict(f"masked updates, {num_sites} sites, {numbers / 1e6:.1f} M numbers", figures, reached=reached)


def party(num_sites: int, numbers: int, bits: int) -> Party:
    """A round of so many sites."""
    settings = "".join(f"{key} = {value}\n" for key, value in SECURE.items())
    experiment = make_experiment(f"[federation]\n{settings}secure_bits = {bits}\n")
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


def sent_by(who: Party, update: NDArray[np.float32]) -> tuple[NDArray[Any], float]:
    """What the first site sends, and its temporaries in chunks."""
    tracemalloc.start()
    keys = who.keys[0]
    masks = [Mask(1, bytes(32)), *(pairwise_mask(0, other, keys.pair_seed(other)) for other in range(1, len(who.keys)))]
    wire = masked(update, 1.0, ring_of(who.header.experiment, len(who.keys)), masks)
    deal(keys, bytes(32))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return wire, (peak - wire.nbytes) / CHUNK_BYTES


def prepared(who: Party, gone: int) -> Callable[[], None]:
    """A masked sum of zeros, and what opens it: shares checked, seeds recovered, masks taken away."""
    total, there = MaskedSum.of(who.header, who.roster), len(who.keys) - gone
    for number in range(there):
        keys, seed = who.keys[number], bytes([number]) * SEED_BYTES
        total.dealings[who.roster.aliases[number]] = deal(keys, seed)
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


def with_processes(num_sites: int) -> int:
    """An open run and a masked one of the same sites, the last of which is gone from the second round on."""
    rounds = {"rounds": 3, "min_available": num_sites - 1, "local_steps": 2}
    open_run = make_experiment(tiny_experiment(image_size=16, **rounds))
    secure = make_experiment(tiny_experiment(image_size=16, **rounds | SECURE))
    with federation(num_sites, image_size=16) as local:
        init = random_checkpoint(local.root / "init", open_run)
        before = rounds_of(local, init, open_run, "open")
        approve_all(local, init, secure)
        after = rounds_of(local, init, secure, "masked", gone=f"site-{num_sites - 1}")
        left = local.stop()
    answered = [len(each["answered"]) for each in after]
    changed = all(each["weights_changed"] for each in after)
    unmasking = max(each["seconds"]["unmask"] for each in after)
    print(f"seconds of rounds, open: {[round(each['seconds']['total'], 1) for each in before]}")
    print(f"seconds of rounds, masked: {[round(each['seconds']['total'], 1) for each in after]}")
    reached = changed and left == 0 and answered[0] == num_sites and answered[-1] == num_sites - 1
    figures = f"{answered} answered in {len(after)} rounds, unmasking at most {unmasking:.1f} s, {left} processes left"
    return verdict(f"masked updates of {num_sites} real sites, one lost", figures, reached=reached)


def approve_all(local: LocalFederation, init: Path, experiment: Experiment) -> None:
    """A first run that every site refuses, for it knows nobody yet; then the operators approve its roster."""
    with suppress(RuntimeError):
        local.finetune(init, experiment, "unknown")
    for index in range(local.num_sites):
        local.call("maskfed-client", "approve", "roster", "unknown", "--yes", "--home", str(local.site(index)))


def rounds_of(local: LocalFederation, init: Path, experiment: Experiment, run: str, gone: str = "") -> list[Any]:
    """Records of the rounds of a run; `gone`: the site that is killed, with all of its processes, after the first."""
    metrics = RunDir(local.home / "runs" / run).metrics
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(local.finetune, init, experiment, run)
        while gone and not following.done():
            time.sleep(0.2)
            if metrics.exists() and any(event["kind"] == "round" for event in read_metrics(metrics)):
                site = psutil.Process(local.daemons.pop(gone).pid)
                for process in [*site.children(recursive=True), site]:
                    with suppress(psutil.NoSuchProcess):
                        process.kill()
                gone = ""
        following.result()
    return [event for event in read_metrics(metrics) if event["kind"] == "round"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
