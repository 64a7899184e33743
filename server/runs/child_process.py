"""Processes that must not outlive the one that started them."""

import ctypes
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
