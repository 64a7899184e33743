"""A gRPC health service (`grpc.health.v1`) of our own, for Kubernetes, compose and doctor, whatever Flower offers.

It answers for what a supervisor runs: the empty name for everything together, and each service by its name. A
supervisor starts programs all the time, and gRPC's threads do not survive that; so the service is a process of its own
that is told each second how things are. A supervisor that says nothing any more is not well either.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

States = Callable[[], Mapping[str, bool]]
"""Whether each service runs and answers, now."""
TELL_SECONDS = 1.0
STALE_SECONDS = 15.0
"""What was told holds no longer than this."""
RETRY_SECONDS = 10.0
THREADS = 2


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Answers each check from `states`."""

    def __init__(self, states: States) -> None:
        self._states = states

    def Check(self, request: Any, context: Any) -> Any:  # noqa: ANN401, N802 - names and types of the protocol
        """SERVING, NOT_SERVING, or NOT_FOUND for a name that nobody has."""
        states = self._states()
        if request.service and request.service not in states:
            context.abort(grpc.StatusCode.NOT_FOUND, f"services here: {', '.join(states)}")
        is_well = states[request.service] if request.service else bool(states) and all(states.values())
        answer = health_pb2.HealthCheckResponse
        return answer(status=answer.SERVING if is_well else answer.NOT_SERVING)


@contextlib.contextmanager
def serve_health(address: str, states: States) -> Iterator[None]:
    """Answer health checks at `address` (host:port) within the block.

    Raises:
        RuntimeError: the address cannot be bound.
    """
    # Without the option a second process would share the port and answer every other check.
    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="health")
    server = grpc.server(pool, options=[("grpc.so_reuseport", 0)])
    health_pb2_grpc.add_HealthServicer_to_server(Health(states), server)
    try:
        server.add_insecure_port(address)
        server.start()
        yield
    finally:
        server.stop(None).wait()
        pool.shutdown()


class HealthProcess:
    """The service in a process of its own, which ends when this one does; without an `address` there is none."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._process: subprocess.Popen[bytes] | None = None
        self._told_at = self._started_at = -RETRY_SECONDS
        self._told: dict[str, bool] = {}

    def tell(self, states: Mapping[str, bool]) -> None:
        """How the services are; the process is started when there is none."""
        now = time.monotonic()
        if not self._address or (dict(states) == self._told and now - self._told_at < TELL_SECONDS):
            return
        if self._process is None or self._process.poll() is not None:
            if now - self._started_at < RETRY_SECONDS:
                return
            self.close()
            self._started_at = now
            argv = [sys.executable, "-I", "-m", "deploy.observe.health", self._address]
            self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, start_new_session=True)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(dict(states)).encode() + b"\n")
            self._process.stdin.flush()
            self._told, self._told_at = dict(states), now

    def close(self) -> None:
        """End the process."""
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
            self._process.kill()
            self._process.wait()
        self._process = None


class Told:
    """What the lines of a supervisor say, as long as they are fresh."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._at = clock, 0.0
        self._states: dict[str, bool] = {}

    def take(self, line: bytes) -> None:
        """Take one line: JSON, name to well or not."""
        self._states, self._at = json.loads(line), self._clock()

    def states(self) -> dict[str, bool]:
        """By service; all are unwell when the last line is old."""
        is_fresh = self._clock() - self._at < STALE_SECONDS
        return {name: is_well and is_fresh for name, is_well in self._states.items()}


def main() -> None:
    """Serve at the address of the first argument what standard input says, until it ends."""
    told, ended = Told(), threading.Event()

    def read() -> None:
        for line in sys.stdin.buffer:
            told.take(line)
        ended.set()

    threading.Thread(target=read, daemon=True, name="told").start()
    with serve_health(sys.argv[1], told.states):
        ended.wait()


if __name__ == "__main__":
    main()
