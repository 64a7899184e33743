"""Can the noise of an update be found and subtracted? Every seed of a range is tried against what a round has released.

A face that the weights answer to adds C along a known direction; the noise is a thousand times larger. Whoever finds
the seed sees the face's share again.
"""

import math
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from benchmarks.privacy_attacks.detector import detector, make_arena, make_experiment, make_request
from benchmarks.privacy_attacks.outcome import Outcome
from client.app import handle
from client.privacy import dp_sgd
from client.privacy.accounting import epsilon
from client.records.spending import Spending
from shared.messages.packing import unpack
from shared.messages.training import TrainRequest

SIGMA, DELTA, SEEDS, EXPECTED = 1000.0, 1e-5, 256, 10**6
"""Noise, and how many seeds are tried: all that the switched-off guard draws from, a start of 2^32 otherwise."""
PLAN = make_experiment(
    privacy={
        "mechanism": "dp-sgd",
        "noise_multiplier": SIGMA,
        "sample_rate": 1.0,
        "expected_batch": EXPECTED,
        "micro_batch": 16,
    }
)


def attack(trials: int, is_guarded: bool, seed: int) -> Outcome:
    """Ask one of two sites that differ by the face, `trials` times, and guess which it was."""
    random = np.random.default_rng(seed)
    coins, correct = random.random(trials) < 0.5, 0
    with tempfile.TemporaryDirectory() as folder, guard(is_guarded):
        arena = make_arena(Path(folder).resolve(), PLAN, seed)
        weights, _ = detector(arena, PLAN)
        # The face's output is huge and the same in all its values, so its gradient is C along the ones.
        weights["mid_block.mlp.fc1.weight"][0, 0], weights["mid_block.mlp.fc2.weight"][3, 0] = 1e6, 1e10
        weights["output.weight"][:, 3] = 1.0
        for number, is_in in enumerate(coins.tolist()):
            request = make_request(PLAN, weights, f"run{number}")
            reply = handle(request.to_record(), arena.homes[int(is_in)])
            share = share_of_face(reply.update, request)
            guess = bool(random.random() < 0.5) if share is None else share > 0.5
            correct += guess == is_in
    return Outcome("noise found by its seed", trials, correct, epsilon([Spending(SIGMA, 1.0, 1)], DELTA))


def share_of_face(update: np.ndarray | None, request: TrainRequest) -> float | None:
    """The sum's length along the ones in C, where a seed explains the update; None where none does."""
    if update is None:
        return None
    optim = request.header.experiment.optim
    # Adam's first step is lr g / (|g| + 1e-8).
    d = torch.from_numpy(unpack(update, request.header.manifest)["output.bias"]).double() / -optim.lr
    total = d * 1e-8 / (1 - d.abs()) * EXPECTED
    for seed in range(SEEDS):
        noise = SIGMA * torch.randn(len(d), generator=torch.Generator().manual_seed(seed)).double()
        if float((torch.sign(total) == torch.sign(noise)).double().mean()) > 0.9:
            return abs(float((total - noise).sum())) / math.sqrt(len(d))
    return None


@contextmanager
def guard(is_guarded: bool) -> Iterator[None]:
    """With the guard off, noise comes from torch's generator, whose seed has 63 bits of which it keeps the lower 32."""
    if is_guarded:
        yield
        return

    def add_weak_noise(total: Tensor, deviation: float, _stream: object) -> None:
        seed = secrets.randbelow(2**31) << 32 | secrets.randbelow(SEEDS)
        random = torch.Generator().manual_seed(seed)
        total.add_((torch.randn(len(total), generator=random).double() * deviation).round())

    with mock.patch.object(dp_sgd, "add_noise", add_weak_noise):
        yield


ATTACKS = {"noise found by its seed": attack}
