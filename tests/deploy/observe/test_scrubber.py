"""What a process below the journal writes, and what its children write, and its last words."""

import os
import subprocess
import sys

PROGRAM = """
import os, subprocess, sys
from deploy.observe.scrubber import scrub_journal
scrub_journal()
print("reading /images/anna/1.png", flush=True)
subprocess.run(["/bin/sh", "-c", "echo 'child sees /images/bob.jpg' >&2"])
os.write(2, b"no newline and \\xff in /data/secret.key")
os.kill(os.getpid(), 9)
"""


def run(**variables: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name != "JOURNAL_STREAM"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, env={**kept, **variables}
    )
    assert done.returncode == -9
    return done.stdout.decode(errors="replace")


def test_below_the_journal_no_path_gets_through_and_no_line_is_lost():
    said = run(JOURNAL_STREAM="8:12345").splitlines()
    assert said == ["reading <path>", "child sees <path>", "no newline and \N{REPLACEMENT CHARACTER} in <path>"]


def test_elsewhere_the_output_stays_as_it_is():
    assert run().splitlines()[:2] == ["reading /images/anna/1.png", "child sees /images/bob.jpg"]
