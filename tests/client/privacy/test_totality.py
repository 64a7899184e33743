"""A private round is a total function of its units: whatever one is, the answer looks the same and moves by at most C.

The units' images are blank but for their first pixel, unit i's is i + 1: what fills a micro-batch up is 0, and nobody.
"""

import errno
import math
from collections.abc import Iterator
from unittest import mock

import numpy as np
import pytest
import torch
from flwr.app import RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.privacy_attacks.detector import (
    Arena,
    detector,
    make_arena,
    make_experiment,
    make_request,
    without_noise,
)
from benchmarks.privacy_attacks.overflow import DP, through_mlp
from benchmarks.privacy_attacks.question_site import fresh_copy
from benchmarks.privacy_attacks.tiny_sites import new_machine
from client import training_request
from client.data.units import Shown
from client.privacy.dp_sgd import PrivateStep, train_private
from client.privacy.randomness.secret_random import secret_streams
from client.records.chain import Chain, read_chain
from client.records.ledger import read_ledger
from client.training.local_round import Round
from client.training_request import handle
from shared.diffusion.losses import Draw, per_unit_loss
from shared.diffusion.uvit import build_model
from tests.client.conftest import SIZE
from tests.client.privacy.test_dp_sgd import CPU, assert_noise, fixed_draw, plan, units_of
from tests.small_network import SMALL

SCALES = [0.0, 1e-45, 1e-38, 1e-20, 1.0, 1e4, 1e19, 1e38, math.inf, -math.inf, math.nan]
"""What a unit's loss is multiplied with."""
C = 0.5


class Numbered:
    """Image i has the number i + 1 in its first pixel."""

    def batch(self, ids: np.ndarray) -> Tensor:
        x = torch.full((len(ids), 3, SIZE, SIZE), 100, dtype=torch.uint8)
        x[:, 0, 0, 0] = torch.from_numpy(ids + 1).byte()
        return x


def scaled_by(scales: list[float], raising: frozenset[int] = frozenset()):
    """Losses of which unit i's is multiplied with `scales[i]`; a batch with a unit of `raising` raises."""

    def loss(model, schedule, experiment, images, *draw):
        numbers = images[:, 0, 0, 0, 0].long() - 1
        if raising & set(numbers.tolist()):
            raise RuntimeError("no memory for this unit")
        factors = torch.tensor([*scales, 1.0])[numbers.clamp(max=len(scales))]  # -1 and beyond: 1.0
        return per_unit_loss(model, schedule, experiment, images, *draw) * factors

    return loss


def total_of(step: PrivateStep, present: list[int]) -> Tensor:
    """The clipped sum of units, by micro-batches, in units of C."""
    step.total.zero_()
    rows = torch.tensor(present).view(-1, 1)
    draw = Draw(*(each.clone() for each in fixed_draw(step.experiment, step.slots, None)))
    for part in torch.split(rows, step.slots):
        step.add(Numbered(), Shown(part.numpy(), torch.zeros(len(part), 1, dtype=torch.bool)), draw)
    return step.total * step.grid / C


def make_step(clipping: str, loss, precision: str = "float32") -> PrivateStep:
    settings = plan(1, max_grad_norm=C, clipping=clipping, expected_batch=16, micro_batch=4)
    torch.manual_seed(0)
    model = build_model(settings)
    # Layers of each kind, small and large ones; all of them would only take longer.
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("embedding", "positions", "mid_block.mlp.fc1", "norm", "output")))
    return PrivateStep(model, settings, CPU, precision, loss)


@pytest.mark.parametrize(
    ("clipping", "precision"), [("fast", "float32"), ("hooks", "float32"), ("fast", "bfloat16"), ("hooks", "bfloat16")]
)
def test_any_unit_moves_the_sum_by_at_most_c_and_the_sum_stays_finite(clipping: str, precision: str):
    @settings(max_examples=3)
    @given(st.lists(st.sampled_from(SCALES), min_size=5, max_size=5), st.sets(st.integers(0, 4), max_size=2))
    def check(scales: list[float], raising: set[int]) -> None:
        step = make_step(clipping, scaled_by(scales, frozenset(raising)), precision)
        whole = total_of(step, [0, 1, 2, 3, 4])
        assert whole.isfinite().all()
        for removed in (0, 4):
            rest = [number for number in range(5) if number != removed]
            assert float((whole - total_of(step, rest)).norm()) <= 1 + 1e-6

    check()


@pytest.mark.parametrize("clipping", ["fast", "hooks"])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_unit_that_cannot_be_computed_is_as_absent_and_changes_no_other(clipping: str, bad: float):
    step = make_step(clipping, scaled_by([1.0, bad, 1.0, 1.0]))
    with_bad, without = total_of(step, [0, 1, 2]), total_of(step, [0, 3, 2])
    assert not torch.equal(with_bad, without)
    raised = make_step(clipping, scaled_by([1.0, 1.0, 1.0], frozenset({1})))
    assert without.norm() > 0
    torch.testing.assert_close(total_of(raised, [0, 1, 2]), with_bad, rtol=0, atol=1e-6)
    torch.testing.assert_close(total_of(step, [0, 2]), with_bad, rtol=0, atol=1e-6)


@pytest.mark.parametrize("clipping", ["fast", "hooks"])
def test_image_that_cannot_be_read_counts_as_zero(clipping: str):
    class Broken(Numbered):
        def batch(self, ids: np.ndarray) -> Tensor:
            if 2 in ids:
                raise OSError("input/output error")
            return super().batch(ids)

    private = plan(2, sample_rate=1.0, clipping=clipping, noise_multiplier=1e-9, max_grad_norm=C, expected_batch=16)
    seen: list[Tensor] = []
    model = build_model(private)
    train_private(
        model,
        private,
        Broken(),
        units_of(*[1] * 4),
        device=CPU,
        after_noise=lambda: seen.append(torch.cat([p.grad.flatten() for p in model.parameters()])),
    )
    assert len(seen) == 2 and all(0 < float(each.norm()) <= 3 * C / 16 for each in seen)


def test_fault_that_does_not_depend_on_the_units_comes_before_the_first_is_read():
    asked: list[int] = []

    class Asked(Numbered):
        def batch(self, ids: np.ndarray) -> Tensor:
            asked.extend(ids.tolist())
            return super().batch(ids)

    def no_memory(*_: object) -> Tensor:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        train_private(build_model(plan()), plan(), Asked(), units_of(1, 1), device=CPU, loss=no_memory)
    assert asked == []


def test_round_whose_every_unit_fails_releases_noise_alone():
    private = plan(1, sample_rate=1.0, noise_multiplier=2.0, max_grad_norm=C, expected_batch=4)
    step = make_step("fast", scaled_by([math.nan] * 6))
    assert float(total_of(step, [0, 1, 2, 3, 4]).norm()) == 0
    step = PrivateStep(build_model(private), private, CPU, "float32", scaled_by([math.nan] * 6))
    step.take(Numbered(), units_of(*[1] * 6), secret_streams())
    gradient = torch.cat([parameter.grad.flatten() for parameter in step.parameters])
    assert_noise(gradient, 2.0 * C / 4)


class Killed(BaseException):
    """Stands for a kill: nothing may catch it."""


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def kill(*_: object) -> None:
    raise Killed


def full_at_commit(self: Chain, kind: str, **fields: object) -> object:
    return full_disk() if kind == "commit" else APPEND(self, kind, **fields)


APPEND = Chain.append
FAULTS = {
    "disk full at the commit": (Chain, "append", full_at_commit, "disk_full"),
    "disk full at the reply": (training_request, "keep_reply", full_disk, "disk_full"),
    "killed after a step": (Round, "_report", kill, None),
}


@pytest.fixture
def arena() -> Iterator[tuple[Arena, RecordDict]]:
    """Two sites that differ by a face, and a request whose weights overflow for it."""
    small = mock.patch("benchmarks.privacy_attacks.detector.WIDTH", SMALL["width"])
    with new_machine() as root, without_noise(), small:
        plan = make_experiment(privacy=DP)
        found = make_arena(root, plan, 0)
        weights, height = detector(found, plan)
        through_mlp(weights, height)
        yield found, make_request(plan, weights, "run").to_record()


@pytest.mark.parametrize("fault", FAULTS)
def test_round_that_disk_or_kill_ends_looks_the_same_with_and_without_a_unit_and_stays_charged(arena, tmp_path, fault):
    owner, name, broken, code = FAULTS[fault]
    seen = []
    for place, home in enumerate(arena[0].homes):
        copied = fresh_copy(home, tmp_path / str(place))
        with mock.patch.object(owner, name, broken):
            try:
                first = handle(arena[1], copied).header.model_dump(exclude={"ledger_hash"})
            except Killed:
                first = {"refusal": None}
        history = read_ledger(copied.ledger)
        again = handle(arena[1], copied).header.model_dump(exclude={"ledger_hash"})
        # What a scan has noted before, for instance that the sites share images, is not of the round.
        kinds = [entry.kind for entry in read_chain(copied.ledger) if entry.kind in ("reserve", "commit", "recovered")]
        kinds += [entry.kind for entry in read_chain(copied.journal)]
        seen.append((first, again, kinds))
        assert first["refusal"] == code and len(history.charges) == 1
    assert seen[0] == seen[1]
