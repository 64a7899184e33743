"""Can the noise of an update be found and subtracted? Every seed of a range is tried against what a round has released.

A face that the weights answer to adds C along a known direction; the noise is a hundred times larger. Whoever finds
the seed takes the noise off again and sees the face's share.
"""

import math
import secrets
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
SEEDS = 64
"""How many seeds are tried. The replaced generator kept 2^32 of them; `core_hours` says what all cost."""
SIGNS, TIMED = 16, 2000
"""Values of a candidate that are compared first, and candidates that are timed; 16 signs leave one in 65,536."""
PRIVACY = {
    "mechanism": "dp-sgd",
    "noise_multiplier": SIGMA,
    "max_grad_norm": NORM,
    "sample_rate": 1.0,
    "expected_batch": EXPECTED,
    "micro_batch": 16,
}


def attack(trials: int, is_guarded: bool, seed: int) -> Outcome:
    """Ask one of two sites that differ by the face, in each trial as if for the first time, and guess which it was."""
    random = np.random.default_rng(seed)
    coins, correct = random.random(trials) < 0.5, 0
    with new_machine() as root, guard(is_guarded), without_noise(), computed_once():
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
            share = share_of_face(reply.update.astype(np.float64), plan.optim.lr)
            guess = bool(random.random() < 0.5) if share is None else share > 0.5
            correct += guess == is_in
    remark = f"guard off tries {SEEDS} seeds; all 2^32 would take {core_hours():.0f} hours of a core like this one"
    return Outcome(NAME, trials, correct, epsilon([Spending(SIGMA, 1.0, 1)], DELTA), remark)


def share_of_face(update: NDArray[np.float64], lr: float) -> float | None:
    """The sum's length along the ones in C, where a seed explains the update; None where none does."""
    d = torch.from_numpy(update) / -lr
    total = d * 1e-8 / (1 - d.abs()) * EXPECTED / NORM
    for seed in range(SEEDS):
        noise = noise_of(len(d), seed)
        if float((torch.sign(total) == torch.sign(noise)).double().mean()) > 0.9:
            return abs(float((total - noise).sum())) / math.sqrt(len(d))
    return None


def noise_of(count: int, seed: int) -> Tensor:
    """What torch's generator gives for a seed, in C."""
    return SIGMA * torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def core_hours(seeds: float = 2.0**32) -> float:
    """CPU hours of one core that so many seeds take with torch's own generator, from the speed of some here."""
    start = time.process_time()
    for seed in range(TIMED):
        torch.sign(noise_of(SIGNS, seed))
    return (time.process_time() - start) / TIMED * seeds / 3600


@contextmanager
def guard(is_guarded: bool) -> Iterator[None]:
    """With the guard off, noise comes from torch's generator, which keeps the lower 32 bits of a seed of 63."""
    if is_guarded:
        yield
        return

    def add_weak_noise(total: Tensor, deviation: float, _stream: object) -> None:
        seed = secrets.randbelow(2**31) << 32 | secrets.randbelow(SEEDS)
        total.add_((noise_of(len(total), seed) * (deviation / SIGMA)).round())

    with mock.patch.object(dp_sgd, "add_noise", add_weak_noise):
        yield


ATTACKS: dict[str, Callable[[int, bool, int], Outcome]] = {NAME: attack}
