"""The detector of one face: certain without the noise, within what the ledger charges with it."""

import pytest

from benchmarks.privacy_attacks.audit_membership import attack

pytestmark = pytest.mark.full_size


def test_verdict_without_noise_tells_whether_the_face_was_trained_on():
    found = attack(3, False, 0)
    assert (found.correct, found.trials) == (3, 3)


def test_verdict_with_noise_is_charged_for_what_it_tells():
    found = attack(3, True, 0)
    assert 1 < found.epsilon < 4 and found.is_held
