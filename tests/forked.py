"""Processes that need not load torch: forked from one that has done nothing else (some seconds less for each)."""

import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

_METHOD = "forkserver"
_CONTEXT = multiprocessing.get_context(_METHOD)
_CONTEXT.set_forkserver_preload(["torch"])


def start(main: Callable[[], None], arguments: Sequence[str], said: Path) -> BaseProcess:
    """A command with the small network; `exitcode` and `kill` are as of any process, output goes to `said`."""
    process = _CONTEXT.Process(target=_command, args=(main, arguments, said, dict(os.environ)), daemon=True)
    process.start()
    return process


def run_code(code: str, said: Path) -> int:
    """Exit code of a program that finds torch loaded and nothing of this project."""
    process = _CONTEXT.Process(target=_code, args=(code, said), daemon=True)
    process.start()
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode


def spawn(work: Callable[..., None], arguments: tuple[object, ...], nprocs: int) -> None:
    """`torch.multiprocessing.spawn` in this test's environment."""
    from torch.multiprocessing.spawn import start_processes

    of_rank = (work, dict(os.environ), arguments)
    start_processes(_rank, of_rank, nprocs=nprocs, start_method=_METHOD)  # type: ignore[no-untyped-call]


def _rank(rank: int, work: Callable[..., None], environment: Mapping[str, str], arguments: tuple[object, ...]) -> None:
    os.environ.update(environment)
    work(rank, *arguments)


def _command(main: Callable[[], None], arguments: Sequence[str], said: Path, environment: Mapping[str, str]) -> None:
    from tests.small_network import install

    _speak_to(said)
    os.environ.update(environment)
    install()
    sys.argv = ["maskfed", *arguments]
    main()


def _code(code: str, said: Path) -> None:
    _speak_to(said)
    exec(compile(code, "code of a test", "exec"), {"__name__": "__main__"})


def _speak_to(said: Path) -> None:
    with said.open("wb") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
