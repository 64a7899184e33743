import contextlib
import socket
import urllib.error
import urllib.request

import pytest

from deploy.observe import prometheus
from deploy.observe.prometheus import Sample, render, serve


def fetch(port: int, path: str = "/metrics") -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as reply:
        return reply.read().decode()


def test_format_is_the_one_that_prometheus_reads():
    text = render(
        [
            Sample("a_total", "counter", "Things.", {"run": "x"}, 3),
            Sample("b", "gauge", "Other.", {}, float("inf")),
            Sample("a_total", "counter", "Things.", {"run": 'quo"te\n\\'}, 0.5),
        ]
    )
    assert text.splitlines() == [
        "# HELP a_total Things.",
        "# TYPE a_total counter",
        'a_total{run="x"} 3',
        'a_total{run="quo\\"te\\n\\\\"} 0.5',
        "# HELP b Other.",
        "# TYPE b gauge",
        "b +Inf",
    ]


def test_scrapes_are_answered_and_nothing_else_is():
    calls: list[int] = []

    def collect() -> list[tuple[object, ...]]:
        calls.append(1)
        return [("n", "gauge", "N.", {}, len(calls))]

    with serve(0, collect) as port:
        assert "n 1\n" in fetch(port)
        assert "n 2\n" in fetch(port)
        with pytest.raises(urllib.error.HTTPError, match="404"):
            fetch(port, "/")


def test_a_failing_source_is_a_503_and_not_the_end():
    def collect() -> list[tuple[object, ...]]:
        raise OSError("disk")

    with serve(0, collect) as port:
        for _ in range(2):
            with pytest.raises(urllib.error.HTTPError, match="503"):
                fetch(port)


def test_who_asks_for_nothing_is_not_kept(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prometheus, "SILENT_SECONDS", 0.2)
    with serve(0, list) as port, socket.create_connection(("127.0.0.1", port), timeout=20) as silent:
        assert silent.recv(1) == b""


def test_connections_of_strangers_keep_nobody_out_and_are_few(monkeypatch: pytest.MonkeyPatch):
    """Each holds a thread and an open file of the process that supervises everything."""
    monkeypatch.setattr(prometheus, "SILENT_SECONDS", 600.0)
    monkeypatch.setattr(prometheus, "MOST_CONNECTIONS", 3)
    with serve(0, list) as port, contextlib.ExitStack() as stack:
        silent = [stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20)) for _ in range(12)]
        assert fetch(port) == ""
        for each in silent[:9]:
            assert each.recv(1) == b""
        silent[-1].setblocking(False)
        with pytest.raises(BlockingIOError):
            silent[-1].recv(1)
