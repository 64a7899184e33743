"""A Prometheus endpoint on loopback: `GET /metrics` in the text exposition format 0.0.4, and nothing else."""

import contextlib
import logging
import math
import re
import socket
from collections.abc import Callable, Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any, Literal, NamedTuple

logger = logging.getLogger(__name__)

SILENT_SECONDS = 10.0
"""How long a connection may say nothing: each holds a thread, and every user of the machine may open some."""
MOST_CONNECTIONS = 16
"""At a time; for one more the oldest ends. So nobody takes all files of the process, nor keeps the others out."""


class Sample(NamedTuple):
    """One value of one series; all samples of a name share kind and help."""

    name: str
    kind: Literal["gauge", "counter"]
    help: str
    labels: dict[str, str]
    value: float


def render(samples: Iterable[Sample]) -> str:
    """The exposition format: samples grouped by name, each group with HELP and TYPE, label values escaped."""
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.name, []).append(sample)
    return "".join(_group(name, group) for name, group in groups.items())


@contextlib.contextmanager
def serve(port: int, collect: Callable[[], Iterable[tuple[object, ...]]]) -> Iterator[int]:
    """Answer scrapes on 127.0.0.1:`port` (0: any free one, yielded) while the block runs.

    Args:
        port: where to listen; never on another address, the figures are the operator's.
        collect: gives the fields of `Sample` for each value; called for every scrape.
    """

    class Handler(BaseHTTPRequestHandler):
        server_version, sys_version = "maskfed", ""
        timeout = SILENT_SECONDS

        def do_GET(self) -> None:
            if self.path != "/metrics":
                self.send_error(404)
                return
            try:
                body = render(Sample(*fields) for fields in collect()).encode()  # type: ignore[arg-type]
            except (OSError, ValueError, KeyError) as error:
                logger.warning("metrics: %s", type(error).__name__)
                self.send_error(503)
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Scrapes are not worth a line."""

    with _Server(("127.0.0.1", port), Handler) as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield int(server.server_address[1])
        finally:
            server.shutdown()
            thread.join()


class _Server(ThreadingHTTPServer):
    """Keeps the newest connections only."""

    daemon_threads = True

    def __init__(self, *given: Any) -> None:  # noqa: ANN401 - Python's own arguments
        self._lock, self._open = Lock(), list[socket.socket]()
        super().__init__(*given)

    def process_request(self, request: Any, client_address: Any) -> None:  # noqa: ANN401
        with self._lock:
            self._open.append(request)
            ended, self._open = self._open[:-MOST_CONNECTIONS], self._open[-MOST_CONNECTIONS:]
        for each in ended:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:  # noqa: ANN401
        with self._lock:
            self._open = [each for each in self._open if each is not request]
        super().shutdown_request(request)


def _group(name: str, samples: list[Sample]) -> str:
    head = f"# HELP {name} {samples[0].help}\n# TYPE {name} {samples[0].kind}\n"
    return head + "".join(f"{name}{_labels(sample.labels)} {_number(sample.value)}\n" for sample in samples)


def _labels(labels: dict[str, str]) -> str:
    if not labels:
        return ""
    pairs = (f'{re.sub(r"[^a-zA-Z0-9_]", "_", name)}="{_escape(text)}"' for name, text in labels.items())
    return "{" + ",".join(pairs) + "}"


def _escape(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    """The shortest text that gives the same number; infinity as the format spells it."""
    return f"{value:+}".replace("inf", "Inf") if math.isinf(value) else repr(float(value)).removesuffix(".0")
