"""Memory of a site's task: limits from the policy, and what happens to a task that outgrows them."""

import logging
import threading

import psutil
import pytest

from client.limits import Ranges
from client.memory import (
    BASE_BYTES,
    MACHINE_SHARE,
    MODELS,
    largest_message_bytes,
    largest_task_bytes,
    resident_bytes,
    watch_memory,
)
from client.settings import SitePolicy
from shared.messages.envelope import MAX_HEADER_BYTES
from shared.messages.statistics import MAX_FILE_BYTES


def policy(parameters, *tasks):
    return SitePolicy(tasks=tasks, ranges=Ranges(parameters=(1, parameters)))


def test_the_largest_message_is_the_largest_model_of_the_policy():
    assert largest_message_bytes(policy(1e6, "train")) == 4_000_000 + MAX_HEADER_BYTES
    assert largest_message_bytes(policy(1e6)) == 4_000_000 + MAX_HEADER_BYTES
    # An audit compares a model with up to four others; statistics bring a projection.
    assert largest_message_bytes(policy(1e6, "audit")) == 20_000_000 + MAX_HEADER_BYTES
    assert largest_message_bytes(policy(1e6, "statistics")) == MAX_FILE_BYTES + MAX_HEADER_BYTES
    assert largest_message_bytes(policy(1e9, "train", "statistics")) == 4 * 10**9 + MAX_HEADER_BYTES


def test_a_task_may_take_what_its_model_needs_but_never_the_machine():
    assert largest_task_bytes(policy(1000)) == BASE_BYTES + MODELS * 4000
    assert largest_task_bytes(policy(1e12)) == int(MACHINE_SHARE * psutil.virtual_memory().total)


def test_a_task_that_outgrows_its_limit_ends_as_an_error_of_its_own(caplog):
    used = [5, 5, 20]
    over = None
    try:
        with caplog.at_level(logging.ERROR, "maskfed.client"), pytest.raises(MemoryError, match=r"0\.0 GiB"):
            over = watch_memory(10, lambda: used.pop(0) if used else 0, seconds=0.001)
            threading.Event().wait(30)
    finally:
        if over:
            over.set()
    assert used == []
    assert "policy.ranges.parameters" in caplog.text


def test_children_count():
    assert resident_bytes() >= psutil.Process().memory_info().rss // 2
