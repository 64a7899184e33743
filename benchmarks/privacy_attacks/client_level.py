"""Attacks on client-level DP by whoever sees its checkpoints: was one site there or not?

Each attack runs the coordinator's own mechanism on made-up updates and guesses from what was released. Without the
guard the mechanism is weakened in the one respect that the attack is about, and the stated epsilon stays.
"""

import hashlib
import random
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from benchmarks.privacy_attacks.outcome import Outcome
from benchmarks.scratch import scratch
from server.federation.client_level.mechanism import central_epsilon, grid_noise, sensitivity
from server.federation.client_level.release_ledger import CentralLedger, NoiseKeys
from server.federation.rounds.selection import choose
from server.federation.updates.aggregation import FixedPointSum
from shared.experiment.config import Experiment, parse_experiment
from shared.seeding import derive_seed
from shared.updates.fixed_point import CLIP_MARGIN, SCALE_BITS

NUM_ELEMENTS = 64
BOUND, DELTA, Z, LOUD = 1.0, 1e-5, 10.0, 20.0
SITES_PER_ROUND, MIN_REPLIES = 5, 5
EARLIER_RELEASES = 200
NUM_SITES, FRACTION, WATCHED_ROUNDS = 20, 0.25, 40
Update = NDArray[np.float32]
Attack = Callable[[random.Random, bool, bool], bool]
"""One guess: (random numbers, whether the site was there, whether the guard is on); what the adversary says."""


def release(updates: Sequence[Update], key: bytes, z: float = Z) -> NDArray[np.float64]:
    """The noised sum of clipped updates, as the coordinator makes it."""
    total = FixedPointSum(NUM_ELEMENTS)
    for update in updates:
        total.fold(update, "float32", 1, CLIP_MARGIN)
    bound = sensitivity(BOUND, NUM_ELEMENTS, SCALE_BITS, CLIP_MARGIN)
    return total.mean(1, grid_noise(key, z * bound, SCALE_BITS)).astype(np.float64)


def gate(draws: random.Random, is_there: bool, is_guarded: bool) -> bool:
    """H5 a: with a site fewer than `min_replies` there was no release at all."""
    updates = [_victim()] * is_there + [_others(draws) for _ in range(MIN_REPLIES - 1)]
    if not is_guarded and len(updates) < MIN_REPLIES:
        return False
    guess = _along(release(updates, draws.randbytes(32))) > 0.5
    return guess if is_guarded else True


def same_name(draws: random.Random, is_there: bool, is_guarded: bool) -> bool:
    """H5 b: a run started again under its name repeats its noise; the difference shows who is new."""
    others = [_others(draws) for _ in range(SITES_PER_ROUND - 1)]
    first, second = ([*others], [*others, *([_victim()] * is_there)])
    keys = _keys(draws, is_guarded, [(first, Z), (second, Z)])
    before, after = release(first, keys[0]), release(second, keys[1])
    return _along(after - before) > 0.5


def two_noises(draws: random.Random, is_there: bool, is_guarded: bool) -> bool:
    """H5 c: the same noise at two multipliers cancels by linear algebra."""
    updates = [_victim()] * is_there + [_others(draws)]
    keys = _keys(draws, is_guarded, [(updates, Z), (updates, LOUD)])
    quiet, loud = release(updates, keys[0], Z), release(updates, keys[1], LOUD)
    return _along((LOUD * quiet - Z * loud) / (LOUD - Z)) > 0.5


def earlier_runs(draws: random.Random, is_there: bool, _: bool) -> bool:
    """H5 d: a run that starts from another releases more about the same sites; the mean over both is sharper."""
    updates = [_victim()] * is_there
    sums = [_along(release(updates, draws.randbytes(32))) for _ in range(EARLIER_RELEASES + 1)]
    return float(np.mean(sums)) > 0.5


def replaced(draws: random.Random, is_there: bool, is_guarded: bool) -> bool:
    """H5 e: a site that is not registered reshuffles everybody, so the sum moves by far more than its own update."""
    everybody = [f"site-{index}" for index in range(NUM_SITES)]
    pick = _guarded_choice if is_guarded else _shuffled_choice
    rounds = [draws.randrange(1, 10**6) for _ in range(WATCHED_ROUNDS)]
    # Selection is public: the adversary watches the round in which the one site changes the most.
    worlds = [(pick(server_round, everybody), pick(server_round, everybody[1:])) for server_round in rounds]
    with_it, without = max(worlds, key=lambda world: len(set(world[0]) ^ set(world[1])))
    present = with_it if is_there else without
    # What an adversary that knows all others' updates would wish them to be: those of one world against the other's.
    updates = [_victim() * np.float32(1 if site in with_it else -1) for site in present]
    middle = (_score(with_it, with_it) + _score(without, with_it)) / 2
    return _along(release(updates, draws.randbytes(32))) > middle


def _score(sites: Sequence[str], with_it: Sequence[str]) -> float:
    return float(sum(1 if site in with_it else -1 for site in sites))


def _shuffled_choice(server_round: int, registered: Sequence[str]) -> list[str]:
    """As it was: the order of all registered sites is drawn, and the first of them are taken."""
    order = sorted(registered)
    random.Random(derive_seed(0, "selection", server_round)).shuffle(order)
    return order[:SITES_PER_ROUND]


def _guarded_choice(server_round: int, registered: Sequence[str]) -> list[str]:
    return choose(_EXPERIMENT, server_round, registered, registered)


def _experiment() -> Experiment:
    federation = {
        "central_noise_multiplier": Z,
        "max_update_norm": BOUND,
        "update_norm_action": '"clip"',
        "sites_per_round": SITES_PER_ROUND,
        "sites_fraction": FRACTION,
    }
    return parse_experiment("[federation]\n" + "".join(f"{key} = {value}\n" for key, value in federation.items()))


_EXPERIMENT = _experiment()


def _victim() -> Update:
    update = np.zeros(NUM_ELEMENTS, np.float32)
    update[0] = BOUND
    return update


def _others(draws: random.Random) -> Update:
    """An update of norm C that the adversary knows, at right angles to the victim's."""
    update = np.array([0.0, *(draws.gauss(0, 1) for _ in range(NUM_ELEMENTS - 1))])
    return (update * BOUND / np.linalg.norm(update)).astype(np.float32)


def _along(released: NDArray[np.float64]) -> float:
    """How much of the victim's update is in what was released."""
    return float(released @ _victim().astype(np.float64)) / BOUND**2


def _keys(draws: random.Random, is_guarded: bool, releases: Sequence[tuple[Sequence[Update], float]]) -> list[bytes]:
    """Noise keys of round 1 of a run that is deleted and started again under the same name for each release."""
    if not is_guarded:
        return [hashlib.sha256(f"secret {draws.random()} run 1".encode()).digest()] * len(releases)
    keys = []
    with scratch() as folder:
        ledger = CentralLedger(folder)
        for number, (updates, z) in enumerate(releases):
            run_folder = folder / str(number)
            run_folder.mkdir()
            inputs = hashlib.sha256(b"".join(update.tobytes() for update in updates)).hexdigest()
            keys.append(NoiseKeys(ledger, "run", run_folder).key(1, z, inputs))
    return keys


def _repeat(name: str, attack: Attack, guarded: Sequence[float], stated: Sequence[float]) -> Callable[..., Outcome]:
    """The attack as the frame calls it; the multipliers that the ledger counts with the guard, and without it."""

    def run(trials: int, is_guarded: bool, seed: int) -> Outcome:
        draws, correct = random.Random(seed), 0
        for _ in range(trials):
            is_there = bool(draws.getrandbits(1))
            correct += attack(draws, is_there, is_guarded) == is_there
        return Outcome(name, trials, correct, central_epsilon(guarded if is_guarded else stated, DELTA))

    return run


ATTACKS: dict[str, Callable[[int, bool, int], Outcome]] = {
    "client-level gate": _repeat("client-level gate", gate, [Z], [Z]),
    "client-level same name": _repeat("client-level same name", same_name, [Z, Z], [Z]),
    "client-level two noises": _repeat("client-level two noises", two_noises, [Z, LOUD], [Z]),
    "client-level earlier runs": _repeat("client-level earlier runs", earlier_runs, [Z] * (EARLIER_RELEASES + 1), [Z]),
    "client-level replaced": _repeat("client-level replaced", replaced, [Z], [Z]),
}
