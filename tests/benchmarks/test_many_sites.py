"""The estimate's arithmetic: every update and every sum is counted once."""

import pytest

from benchmarks.many_sites import HUB_LINK, machine, tree


def test_a_tree_has_as_many_levels_as_its_fan_out_needs_and_sums_are_larger_than_updates():
    levels = tree(10_000, 100, numbers=1000, update_bytes=1016.0, add=0.5, add_sum=0.25)
    assert [level.children for level in levels] == [100, 100]
    assert [level.bytes_in for level in levels] == [100 * 1016, 100 * 8000]
    assert [level.bytes_out for level in levels] == [8000, 0]
    assert levels[0].seconds == pytest.approx(50 + 8000 / HUB_LINK) and levels[1].seconds == pytest.approx(25)
    assert levels[0].memory_bytes == 8000 + 4 * 1016
    assert [level.children for level in tree(101, 100, 10, 10.0, 0, 0)] == [100, 2]
    assert [level.children for level in tree(100, 100, 10, 10.0, 0, 0)] == [100]


def test_a_machine_is_as_slow_as_its_link_or_its_processor():
    assert machine(10, 1000, HUB_LINK, 0.1, is_top=True).seconds == pytest.approx(10)
    assert machine(10, 1000, HUB_LINK, 3.0, is_top=True).seconds == pytest.approx(30)
