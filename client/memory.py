"""What one message and one process of this site may take, from the largest model that its policy allows.

The size of a message is checked before it is put together, memory while a task runs: a request whose work outgrows the
limit is refused as failed, and the machine goes on.
"""

import logging
import os
import signal
import threading
from collections.abc import Callable

import psutil

from client.settings import SitePolicy
from shared.messages.audit import MOST_REFERENCES
from shared.messages.envelope import MAX_HEADER_BYTES
from shared.messages.statistics import MAX_FILE_BYTES

LARGEST_VARIABLE = "MASKFED_LARGEST_MESSAGE_BYTES"
"""Read before a message is inflated, by the guard in whose process this runs."""
BYTES_PER_PARAMETER = 4
BASE_BYTES = 4 * 2**30
MODELS = 16
"""Resident memory of a task: libraries and images, and so many times the largest model."""
MACHINE_SHARE = 0.9
LOOK_SECONDS = 1.0
PATIENCE = 10
"""Looks after which a task that does not let go is killed."""
log = logging.getLogger("maskfed.client")


def largest_message_bytes(policy: SitePolicy) -> int:
    """Arrays of the largest message that the policy lets anybody ask: a model, an audit's models, a projection."""
    model = int(policy.ranges.parameters[1] * BYTES_PER_PARAMETER)
    models = 1 + MOST_REFERENCES if "audit" in policy.tasks else 1
    return max(models * model, MAX_FILE_BYTES if "statistics" in policy.tasks else 0) + MAX_HEADER_BYTES


def largest_task_bytes(policy: SitePolicy) -> int:
    """Resident memory of a task with its children; never more than nine tenths of the machine's."""
    needed = BASE_BYTES + int(MODELS * policy.ranges.parameters[1] * BYTES_PER_PARAMETER)
    return min(needed, int(MACHINE_SHARE * psutil.virtual_memory().total))


def resident_bytes() -> int:
    """Of this process and all below it."""
    own = psutil.Process()
    total = 0
    for process in (own, *own.children(recursive=True)):
        try:
            total += process.memory_info().rss
        except psutil.Error:  # it has just ended
            continue
    return total


def watch_memory(
    limit: int, measure: Callable[[], int] = resident_bytes, seconds: float = LOOK_SECONDS, patience: int = PATIENCE
) -> threading.Event:
    """Raise MemoryError in the main thread when `measure` passes `limit`; kill this process if that does not help.

    Args:
        limit: bytes.
        measure: what is in use, in bytes.
        seconds: between two looks.
        patience: looks above the limit after which this process is killed.

    Returns:
        Set it to end the watch.
    """

    def give_up(_number: int, _frame: object) -> None:
        raise MemoryError(f"the task needs more than {limit / 2**30:.1f} GiB")

    def watch() -> None:
        looks = 0
        while not over.wait(seconds):
            looks = looks + 1 if (used := measure()) > limit else 0
            if looks == 1:
                log.error(
                    "the task has %.1f GiB, at most %.1f are allowed: it is ended. The limit follows the upper end of "
                    "policy.ranges.parameters, and the machine's memory", used / 2**30, limit / 2**30,
                )  # fmt: skip
                os.kill(os.getpid(), signal.SIGUSR1)
            if looks > patience:
                log.error("the task does not let go of its memory: killed")
                os.kill(os.getpid(), signal.SIGKILL)

    over = threading.Event()
    signal.signal(signal.SIGUSR1, give_up)
    threading.Thread(target=watch, daemon=True, name="memory").start()
    return over
