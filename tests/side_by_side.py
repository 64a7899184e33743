"""Tests in processes that are forked after collection: one alone imports and collects, which takes some 20 s."""

import gc
import os
import signal
import traceback
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path

import pytest

Group = Sequence[pytest.Item]
"""Tests that run one after the other in one process."""


def run(session: pytest.Session, groups: Sequence[Group], num_workers: int) -> None:
    """All `groups`, each in the first of `num_workers` processes that is free; results are told in this one."""
    gc.collect()
    gc.freeze()  # Collections leave what is shared alone: they are shorter, and its pages stay shared.
    _Run(session, groups).run(num_workers)


@dataclass
class _Worker:
    """A process, and the tests `of_group[first_open:]` that it has yet to finish."""

    pid: int
    of_group: int = 0
    first_open: int = 0


class _Run:
    """The process that collected: it hands out groups and hears of results."""

    def __init__(self, session: pytest.Session, groups: Sequence[Group]) -> None:
        self.session = session
        self.groups = groups
        self.waiting = deque((number, 0) for number in range(len(groups)))
        self.workers: dict[Connection, _Worker] = {}
        self.num_started = 0
        self.temporary: Path = session.config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]

    def run(self, num_workers: int) -> None:
        try:
            for _ in range(min(num_workers, len(self.groups))):
                self.start()
            while self.workers:
                for connection in wait(list(self.workers)):
                    assert isinstance(connection, Connection)
                    self.hear(connection)
                    self.stop_if_asked()
        finally:
            for worker in self.workers.values():
                os.kill(worker.pid, signal.SIGINT)
            for worker in self.workers.values():
                os.waitpid(worker.pid, 0)

    def start(self) -> None:
        here, there = Pipe()
        self.num_started += 1
        pid = os.fork()
        if pid == 0:
            for other in (here, *self.workers):
                other.close()  # Or a process would not see that this one has ended.
            _work(self.session, self.groups, there, self.temporary / str(self.num_started))
        there.close()
        self.workers[here] = _Worker(pid)
        self.hand_out(here)

    def hand_out(self, connection: Connection) -> None:
        """The next group, or None: then the process ends."""
        task = self.waiting.popleft() if self.waiting else None
        worker = self.workers[connection]
        worker.of_group, worker.first_open = task or (0, len(self.groups[0]))
        connection.send(task)

    def hear(self, connection: Connection) -> None:
        """A report; None, which is the end of a test; or what went wrong outside of tests."""
        config, worker = self.session.config, self.workers[connection]
        try:
            said = connection.recv()
        except (EOFError, ConnectionResetError):
            self.ended(connection)
            return
        if isinstance(said, str):
            raise RuntimeError(said)
        if said is not None:
            config.hook.pytest_runtest_logreport(
                report=config.hook.pytest_report_from_serializable(config=config, data=said)
            )
            return
        worker.first_open += 1
        if worker.first_open == len(self.groups[worker.of_group]):
            self.hand_out(connection)

    def ended(self, connection: Connection) -> None:
        """A process that ended in the middle of a test fails that test; another one goes on with the next."""
        worker = self.workers.pop(connection)
        connection.close()
        _, status = os.waitpid(worker.pid, 0)
        rest = self.groups[worker.of_group][worker.first_open :]
        if rest:
            code = os.waitstatus_to_exitcode(status)
            report = pytest.TestReport(
                rest[0].nodeid, rest[0].location, {}, "failed", f"its process ended with {code}", "call"
            )
            self.session.config.hook.pytest_runtest_logreport(report=report)
            if len(rest) > 1:
                self.waiting.appendleft((worker.of_group, worker.first_open + 1))
            if self.waiting:
                self.start()

    def stop_if_asked(self) -> None:
        """After as many failures as `-x` or `--maxfail` allow."""
        if self.session.shouldfail:
            raise self.session.Failed(self.session.shouldfail)
        if self.session.shouldstop:
            raise self.session.Interrupted(self.session.shouldstop)


class _Reports:
    """Sends what a terminal would show; in place of the terminal, whose writer some plugins ask for."""

    def __init__(self, config: pytest.Config, connection: Connection) -> None:
        self.config = config
        self.connection = connection
        self._tw = config.get_terminal_writer()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.connection.send(self.config.hook.pytest_report_to_serializable(config=self.config, report=report))


def _work(session: pytest.Session, groups: Sequence[Group], connection: Connection, temporary: Path) -> None:
    """The forked process: groups until there are none."""
    code = 1
    try:
        _own(session.config, connection, temporary)
        while (task := connection.recv()) is not None:
            number, first = task
            items = groups[number][first:]
            # After a group comes something else of the same session, whose fixtures stay.
            for item, after in zip(items, [*items[1:], session], strict=True):
                session.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
                connection.send(None)
        session._setupstate.teardown_exact(None)
        code = 0
    except KeyboardInterrupt:
        session._setupstate.teardown_exact(None)
    except BaseException:
        connection.send(traceback.format_exc())
    finally:
        os._exit(code)


def _own(config: pytest.Config, connection: Connection, temporary: Path) -> None:
    """What two processes must not share: the terminal, files of captured output, the folder of temporary files."""
    plugins = config.pluginmanager
    reports = _Reports(config, connection)
    plugins.unregister(name="terminalreporter")
    plugins.register(reports, "terminalreporter")
    capture = plugins.get_plugin("capturemanager")
    assert capture is not None
    capture.stop_global_capturing()
    capture.start_global_capturing()
    capture.suspend_global_capture(in_=False)
    temporary.mkdir()
    config._tmp_path_factory._basetemp = temporary  # type: ignore[attr-defined]
