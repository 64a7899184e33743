"""Can the noise of an update be found and subtracted? Seeds are tried against what a round has released.

A face that the weights answer to adds C along a known direction; the noise is a hundred times larger. Whoever finds
the seed takes the noise off again and sees the face's share. torch's CPU generator keeps 32 bits of a seed (Mersenne
twister, Matsumoto and Nishimura 1998); the signs of its first sixteen numbers tell seeds apart, many at once.

Each trial searches the `WINDOW` seeds around the right one. `python -m benchmarks.privacy_attacks.noise_seed` searches
all 2^32 once, most of an hour on one core.
"""

import itertools
import math
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.privacy_attacks.detector import detector, make_arena, make_experiment, make_request, without_noise
from benchmarks.privacy_attacks.outcome import Outcome
from benchmarks.privacy_attacks.question_site import computed_once, fresh_copy
from benchmarks.privacy_attacks.tiny_sites import new_machine
from client.privacy import dp_sgd
from client.privacy.accounting import epsilon
from client.records.spending import Spending
from client.training_request import handle

NAME = "noise found by its seed"
SIGMA, NORM, EXPECTED, DELTA = 100.0, 1e-4, 65_536, 1e-5
"""C is small and the divisor large, as far as a site allows by default: so Adam's first step lr g / (|g| + 1e-8) still
tells g, and not only its sign."""
WINDOW, ALL = 2**18, 2**32
"""How many seeds a trial tries, and how many the generator tells apart."""
SIGNS, ALIKE, SAME = 16, 15, 0.9
"""Numbers whose signs are compared first, how many of them agree at least, and the share of all that has to."""
AT_ONCE = 2**14
"""Seeds whose state fits into a cache."""
STATE, SHIFTED = range(16, 33), range(413, 429)
"""Words of the generator's state that the first sixteen signs are made of: see `first_signs`."""
Words = NDArray[np.uint32]
PRIVACY = {
    "mechanism": "dp-sgd",
    "noise_multiplier": SIGMA,
    "max_grad_norm": NORM,
    "sample_rate": 1.0,
    "expected_batch": EXPECTED,
    "micro_batch": 16,
}


def attack(trials: int, is_guarded: bool, seed: int, window: int = WINDOW) -> Outcome:
    """Ask one of two sites that differ by the face, in each trial as if for the first time, and guess which it was."""
    random = np.random.default_rng(seed)
    coins, correct, seconds = random.random(trials) < 0.5, 0, 0.0
    with new_machine() as root, guard(is_guarded) as drawn, without_noise(), computed_once():
        plan = make_experiment(privacy=PRIVACY)
        arena = make_arena(root, plan, seed)
        weights, _ = detector(arena, plan)
        # The face's output is large and the same in all its values, so its gradient is C along the ones.
        weights["mid_block.mlp.fc1.weight"][0, 0], weights["mid_block.mlp.fc2.weight"][3, 0] = 1e6, 1e10
        weights["output.weight"][:, 3] = 10.0
        request = make_request(plan, weights, "run").to_record()
        for number, is_in in enumerate(coins.tolist()):
            reply = handle(request, fresh_copy(arena.homes[int(is_in)], root / str(number)))
            assert reply.update is not None, f"the site's policy refuses the attack: {reply.header.reason}"
            # With the guard on there is no seed: any window is as good as another.
            first = (drawn[-1] if drawn else int(random.integers(ALL))) // window * window
            start = time.process_time()
            share = share_of_face(reply.update.astype(np.float64), plan.optim.lr, range(first, first + window))
            seconds += time.process_time() - start
            guess = bool(random.random() < 0.5) if share is None else share > 0.5
            correct += guess == is_in
    rate = trials * window / seconds
    remark = f"{window} seeds a trial, {rate / 1e6:.1f} million a second: all 2^32 take {ALL / rate / 60:.0f} minutes"
    return Outcome(NAME, trials, correct, epsilon([Spending(SIGMA, 1.0, 1)], DELTA), remark)


def share_of_face(update: NDArray[np.float64], lr: float, seeds: range) -> float | None:
    """The sum's length along the ones in C, where a seed explains the update; None where none does."""
    d = torch.from_numpy(update) / -lr
    total = d * 1e-8 / (1 - d.abs()) * EXPECTED / NORM
    signs = (total[:SIGNS] > 0).numpy()
    for start in range(seeds.start, seeds.stop, AT_ONCE):
        some = np.arange(start, min(start + AT_ONCE, seeds.stop), dtype=np.uint32)
        alike = (first_signs(some) == signs[:, None]).sum(0) >= ALIKE
        for seed in some[alike].tolist():
            noise = noise_of(len(d), seed)
            if float((torch.sign(total) == torch.sign(noise)).double().mean()) > SAME:
                return abs(float((total - noise).sum())) / math.sqrt(len(d))
    return None


def first_signs(seeds: Words) -> NDArray[np.bool_]:
    """(16, N): whether each of the first sixteen numbers of `noise_of` is positive, for N seeds.

    Numbers j and j + 8 are r cos(2 pi u) and r sin(2 pi u), and u is the (j + 8)th of the uniform numbers, each of
    which takes two outputs: so the quadrant of u, two bits of output 16 + 2 j, gives both signs.
    """
    state: dict[int, Words] = {}
    word, shifted = seeds.copy(), np.empty_like(seeds)
    for number in itertools.count(1):
        np.right_shift(word, 30, out=shifted)
        np.bitwise_xor(word, shifted, out=word)
        np.multiply(word, np.uint32(1812433253), out=word)
        np.add(word, np.uint32(number), out=word)
        if number in STATE or number in SHIFTED:
            state[number] = word.copy()
        if number == SHIFTED[-1]:
            break
    quarters = [output(state, place) >> 19 & 3 for place in range(16, 32, 2)]
    cosines = [(quarter == 0) | (quarter == 3) for quarter in quarters]
    sines = [quarter < 2 for quarter in quarters]
    return np.array(cosines + sines)


def output(state: dict[int, Words], place: int) -> Words:
    """One of the generator's outputs after its first turn."""
    joined = (state[place] & 0x80000000) | (state[place + 1] & 0x7FFFFFFF)
    y: Words = state[place + 397] ^ (joined >> 1) ^ np.where(joined & 1, np.uint32(0x9908B0DF), np.uint32(0))
    y = y ^ (y >> 11)
    y = y ^ (y << 7 & 0x9D2C5680)
    y = y ^ (y << 15 & 0xEFC60000)
    return y ^ (y >> 18)


def noise_of(count: int, seed: int) -> Tensor:
    """What torch's generator gives for a seed, in C."""
    return SIGMA * torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@contextmanager
def guard(is_guarded: bool) -> Iterator[list[int]]:
    """With the guard off, noise comes from torch's generator; gives the bits of each seed that it keeps."""
    drawn: list[int] = []
    if is_guarded:
        yield drawn
        return

    def add_weak_noise(total: Tensor, deviation: float, _stream: object) -> None:
        seed = secrets.randbits(63)
        drawn.append(seed % ALL)
        total.add_((noise_of(len(total), seed) * (deviation / SIGMA)).round())

    with mock.patch.object(dp_sgd, "add_noise", add_weak_noise):
        yield drawn


ATTACKS: dict[str, Callable[[int, bool, int], Outcome]] = {NAME: attack}


if __name__ == "__main__":
    whole = attack(1, False, 0, ALL)
    print(f"{whole.correct} of 1 right after a search of all seeds; {whole.remark}")
    sys.exit(0 if whole.correct else 1)
