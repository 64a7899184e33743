"""A parent for programs with children of their own: `python -I -m deploy.processes.keeper PROGRAM ...`.

The kernel ends a process when its parent dies, but not the processes below it: nginx's master would go, its worker
would stay on the public port. The keeper is told by the kernel when the supervisor dies, however it dies, and then ends
the program and everything below it.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys

from deploy.processes.process import adopt_orphans, die_with_parent, end_descendants

_PR_SET_PDEATHSIG = 1


def main() -> int:
    """Run the program; its exit code, after everything below it has ended."""
    supervisor = os.getppid()
    adopt_orphans()
    _tell_me_when_the_parent_dies()
    program = subprocess.Popen(sys.argv[1:], preexec_fn=die_with_parent)  # noqa: PLW1509 - one system call

    def end(_number: int, _frame: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            program.terminate()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, end)
    if os.getppid() != supervisor:  # it died before the kernel knew whom to tell
        program.terminate()
    code = program.wait()
    end_descendants()
    return code


def _tell_me_when_the_parent_dies() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
