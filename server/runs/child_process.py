"""Processes that must not outlive the one that started them."""

import ctypes
import os
import resource
import signal
from collections.abc import Callable

_PDEATHSIG = 1


def dies_with_parent() -> Callable[[], None]:
    """What `subprocess.Popen` calls in the child (`preexec_fn`): it ends when its parent does, even a killed one.

    The C library is loaded here, before the fork; the child makes one system call.
    """
    libc = ctypes.CDLL(None)

    def die_with_parent() -> None:
        libc.prctl(_PDEATHSIG, signal.SIGKILL)

    return die_with_parent


def in_background() -> Callable[[], None]:
    """For a child with torch (`preexec_fn`): it yields to the rounds, and dies with the ServerApp.

    The limit on the ServerApp's addresses is not the child's: torch and CUDA reserve far more than they use.
    """
    die_with_parent = dies_with_parent()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)

    def in_child() -> None:
        os.nice(10)
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        die_with_parent()

    return in_child
