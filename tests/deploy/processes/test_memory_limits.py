"""Limits of memory: from the model's size, kept by the kernel, inherited by nobody who needs more."""

import subprocess
import sys

import pytest

from deploy.errors import ProvisionError
from deploy.processes.memory_limits import DEFAULT_PARAMETERS, NEEDS, PARAMETERS_VARIABLE, SPARE_BYTES, main, parameters


def in_process(code, **environment):
    head = (
        "import resource, deploy.processes.memory_limits as m\nlimit = lambda: resource.getrlimit(resource.RLIMIT_AS)\n"
    )
    return subprocess.run(
        [sys.executable, "-I", "-c", head + code], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("size", [3.4e6, 233e6])
def test_a_process_gets_what_its_model_needs_and_no_more(size):
    code = """
m.limit_own_memory("superexec")
m.limit_own_memory("serverapp")
print(*limit())
bytearray(2**28)
try:
    bytearray(limit()[0])
except MemoryError:
    print("refused")
m.lift_own_limit()
print(*limit())
"""
    done = in_process(code, MASKFED_PARAMETERS=str(size))
    limited, refused, lifted = done.stdout.splitlines()
    assert limited == f"{NEEDS['serverapp'].of(size) + SPARE_BYTES} -1"
    assert (refused, lifted) == ("refused", "-1 -1")


def test_a_stricter_limit_of_the_system_stays(tmp_path):
    code = "resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))\nm.limit_own_memory('superlink')\nprint(*limit())\n"
    assert in_process(code + "m.lift_own_limit()\nprint(*limit())").stdout.split() == [str(2**31)] * 4


def test_needs_grow_with_the_model():
    for need in NEEDS.values():
        assert need.of(2e9) - need.of(1e9) == need.models * 4 * 10**9


@pytest.mark.parametrize("text", ["many", "0", "-3", "nan", "inf", "1e13"])
def test_a_size_that_is_none_is_refused_by_name(monkeypatch, text):
    monkeypatch.setenv(PARAMETERS_VARIABLE, text)
    with pytest.raises(ProvisionError, match=f"{PARAMETERS_VARIABLE}={text}"):
        parameters()
    monkeypatch.setenv(PARAMETERS_VARIABLE, "")
    assert parameters() == DEFAULT_PARAMETERS
    with pytest.raises(SystemExit):
        main([text])


def test_what_is_printed_names_every_process(capsys):
    assert main(["1e9"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in NEEDS)
    assert "container server: MASKFED_MEMORY=" in shown
