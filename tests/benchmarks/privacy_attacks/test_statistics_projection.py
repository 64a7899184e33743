"""The hostile projection: certain with the guards off, a coin with them on."""

from benchmarks.privacy_attacks.statistics_projection import attack


def test_without_its_guards_the_statistics_give_every_image_away():
    found = attack(5, False, 1)
    assert (found.correct, found.trials) == (5, 5)
    assert 0 < found.epsilon < 0.02 and not found.is_held


def test_with_them_nothing_is_released_or_charged():
    found = attack(5, True, 1)
    assert found.epsilon == 0 and found.is_held
