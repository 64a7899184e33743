"""What the programs of both sides are started with."""

import platform
import subprocess
import sys
from pathlib import Path

from deploy.processes.services import LARGE_PAGES, environment
from tests.needs import need

LARGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
FLAGS_OF_A_CHUNK = """
import ctypes, threading
kept = []
def work():  # the second time glibc takes it from its heap, as it has learnt
    for _ in range(2):
        kept[:] = []
        kept.append(bytearray(5 * 2**20))
thread = threading.Thread(target=work)
thread.start()
thread.join()
chunk = kept[0]
address = ctypes.addressof(ctypes.c_char.from_buffer(chunk))
for line in open("/proc/self/smaps"):
    if "-" in (place := line.split()[0]) and ":" not in place:
        start, end = (int(each, 16) for each in place.split("-"))
    if line.startswith("VmFlags:") and start <= address < end:
        print(line)
"""


def test_memory_for_weights_is_asked_for_in_large_pages(tmp_path: Path):
    need(platform.libc_ver() >= ("glibc", "2.35"), "glibc asks for large pages from 2.35 on")
    need(LARGE.exists() and "[never]" not in LARGE.read_text(), "this kernel has no large pages")
    flags = {
        name: subprocess.run(
            [sys.executable, "-I", "-c", FLAGS_OF_A_CHUNK], env=given, capture_output=True, text=True, check=True
        ).stdout.split()
        for name, given in (("large", environment(tmp_path, LARGE_PAGES)), ("else", environment(tmp_path)))
    }
    assert "hg" in flags["large"]
    assert "hg" not in flags["else"]
