"""What Flower's processes write, on its way to the journal: without paths and names of files.

Their own files keep everything; a journal is collected elsewhere. The scrubber is a process of its own, so that the
last words of one that crashes come through, and it ends when nobody is left who could write to it.
"""

import os
import signal
import subprocess
import sys

from deploy.observe.logs import scrub

JOURNAL_VARIABLE = "JOURNAL_STREAM"
"""Set by systemd where standard error is the journal."""
LONGEST_LINE_BYTES = 64 * 1024


def scrub_journal() -> None:
    """Where the output goes to the journal, send it, and that of every process started from now on, through here."""
    if JOURNAL_VARIABLE not in os.environ:
        return
    reader, writer = os.pipe()
    subprocess.Popen([sys.executable, "-I", "-m", "deploy.observe.scrubber"], stdin=reader, start_new_session=True)
    os.close(reader)
    for standard in (1, 2):
        os.dup2(writer, standard)
    os.close(writer)


def main() -> None:
    """Copy lines from standard input to standard output, scrubbed."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    while line := sys.stdin.buffer.readline(LONGEST_LINE_BYTES):
        sys.stdout.write(scrub(line.decode(errors="replace")))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
