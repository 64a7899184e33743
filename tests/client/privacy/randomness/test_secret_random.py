"""The quality of the numbers of a private round: moments, tails, correlation, and that streams differ."""

import math

import pytest
import torch
from scipy.stats import norm

from client.privacy.randomness.secret_random import POSITIVE, SecretRandom, box_muller, secret_streams

COUNT = 2_000_000


def source(name: int = 0) -> SecretRandom:
    return SecretRandom(name.to_bytes(32, "big"))


def test_normal_numbers_have_the_moments_of_a_normal_number():
    x = source().randn((COUNT,)).double()
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3), (5, 0), (6, 15)):
        # The variance of x^p is (2p - 1)!! minus the moment squared.
        spread = math.sqrt((math.prod(range(1, 2 * power, 2)) - moment**2) / COUNT)
        assert abs(float((x**power).mean()) - moment) < 5 * spread, power


def test_tails_up_to_four_sigma_hold_as_many_numbers_as_they_should():
    x = source(1).randn((COUNT,)).double()
    for bound in (1.0, 2.0, 3.0, 4.0):
        for tail in (x > bound, x < -bound):
            expected = COUNT * norm.sf(bound)
            assert abs(int(tail.sum()) - expected) < 5 * math.sqrt(expected), bound


def test_tails_up_to_six_sigma_hold_as_many_numbers_as_they_should():
    # Only pairs with r > 5 or 6 can reach so far: of these there are exp(-r^2 / 2), drawn here alone.
    for bound in (5.0, 6.0):
        share = math.exp(-(bound**2) / 2)
        words = source(2).randint(round(share * 2**63), (200_000,))
        x, _, r = box_muller(words, source(3)._stream.bits(200_000))
        assert float(r.min()) >= bound * (1 - 1e-9)
        expected = 2 * 200_000 * norm.sf(bound) / share
        assert abs(int((x > bound).sum()) - expected) < 5 * math.sqrt(expected), bound


def test_numbers_of_a_stream_and_of_two_streams_are_not_correlated():
    x, other = source(4).randn((COUNT,)).double(), source(5).randn((COUNT,)).double()
    half = COUNT // 2
    for left, right in ((x[:-1], x[1:]), (x[:half], x[half:]), (x, other), (x**2 - 1, other**2 - 1)):
        assert abs(float((left * right).mean())) < 5 * 2 / math.sqrt(half)


def test_uniform_numbers_and_integers_are_uniform():
    x = source(6).rand((1000, 1000))
    assert x.dtype == torch.float32 and float(x.min()) >= 0 and float(x.max()) < 1
    assert (torch.histc(x, 100) - 10_000).abs().max() < 5 * 100
    numbers = source(7).randint(7, (700_000,))
    assert (numbers.bincount(minlength=7) - 100_000).abs().max() < 5 * 300
    assert numbers.max() == 6


def test_units_are_sampled_with_the_rate_and_all_of_them_at_one():
    assert abs(len(source(8).sample(1_000_000, 0.1)) - 100_000) < 5 * 300
    assert source(8).sample(5, 1.0).tolist() == [0, 1, 2, 3, 4]
    assert len(source(8).sample(0, 0.5)) == 0
    assert len(source(8).sample(100_000, 1e-9)) == 0


@pytest.mark.parametrize("bit", [0, 31, 32, 63, 64, 255])
def test_every_bit_of_a_key_changes_every_number(bit):
    one, other = (SecretRandom(key.to_bytes(32, "little")).randn((64,)) for key in (5, 5 ^ 2**bit))
    assert not (one == other).any()


def test_roots_are_fresh_and_purposes_and_steps_have_streams_of_their_own():
    first, second = secret_streams(), secret_streams()
    keys = {streams.key(*names) for streams in (first, second) for names in (("units", 1), ("noise", 1), ("noise", 2))}
    assert len(keys) == 6
    assert str(first.root) not in repr(first)


def test_shapes_are_those_asked_for():
    for shape in ((), (3,), (0, 4), (2, 3, 5)):
        for made in (source().rand(shape), source().randn(shape), source().randint(9, shape)):
            assert made.shape == shape
    assert int(source().randint(2**62, (1,))) <= POSITIVE


def test_no_unit_is_taken_more_often_than_it_was_charged_for(monkeypatch: pytest.MonkeyPatch):
    random = source(8)
    monkeypatch.setattr(random._stream, "bits", lambda count: torch.zeros(count, dtype=torch.int64))
    assert len(random.sample(5, 1e-30)) == 0, "the smallest word is taken at rates of 2^-63 and more"
    assert len(random.sample(5, 2.0**-63)) == 5
