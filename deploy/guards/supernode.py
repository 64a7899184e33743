"""The SuperNode behind its guard: `python -I -m deploy.guards.supernode ...` with `flower-supernode`'s arguments.

Its own port has runtime paths only, for the site's superexec and its processes; they show the site's secret value.
Where no supervisor of ours stands above it, `--health-server-address` is answered here and not by Flower.
Its calls to the coordinator show the certificate that lies beside the node key, go through the proxy that MASKFED_PROXY
names and through no other. While a run is active it looks for messages more often than Flower does.
"""

import contextlib
import os
import ssl
import sys
import time
from collections.abc import Callable
from contextvars import ContextVar
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import flwr.supernode.main as application
import flwr.supernode.start_client_internal as loop
import httpx
from flwr.supercore.protobuf.client import ProtobufClient
from flwr.supernode.cli import flower_supernode
from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState

from deploy.checks.answering import is_listening
from deploy.errors import ProvisionError
from deploy.guards import replace
from deploy.guards.web.asgi import Guard
from deploy.guards.web.calls import News, Pauses, StalledError, caller_value, look_again_soon
from deploy.guards.web.connections import close_the_silent
from deploy.guards.web.direct import Direct, runtime_work
from deploy.guards.web.held_questions import HELD_SECONDS, WAITING
from deploy.guards.web.http_client import HttpClient
from deploy.identity.addresses import PROXY_VARIABLE
from deploy.identity.tls import client_context
from deploy.observe.health import serve_health
from deploy.observe.scrubber import scrub_journal
from deploy.processes.memory_limits import limit_own_memory

STALLED_SECONDS = 60.0
"""Between two parts of an answer, which are sent over loopback, before its process counts as frozen."""
LOOK_SECONDS = 15.0
"""Longest without a look for messages, should the SuperLink have been told of one and not have rung."""
HEALTH_OPTION = "--health-server-address"
T = TypeVar("T")


def main() -> None:
    """Put the guard in place and run the SuperNode."""
    scrub_journal()
    os.umask(0o077)
    try:
        limit_own_memory("supernode")
        value = caller_value(_file("--superexec-auth-secret-file"))
        context = client_context(_file("--root-certificates"), _file("--auth-supernode-private-key"))
    except (ProvisionError, ValueError) as error:
        sys.exit(f"error: the SuperNode does not start: {error}")
    tasks, answers = News(), News()
    install(value, tasks, answers)
    close_the_silent()
    look_again_soon()
    look_often(Pauses(answers), tasks)
    show_certificate(context, os.environ.get(PROXY_VARIABLE, ""))
    sys.argv[0] = "flower-supernode"
    with own_health(sys.argv):
        flower_supernode()


def own_health(argv: list[str]) -> contextlib.AbstractContextManager[None]:
    """Take the option of the health check out of `argv` and answer it; the SuperNode is well when its port answers."""
    if HEALTH_OPTION not in argv:
        return contextlib.nullcontext()
    address = argv.pop(argv.index(HEALTH_OPTION) + 1)
    argv.remove(HEALTH_OPTION)
    given = dict(pairwise(argv))
    runtime, authority = f"{given['--host']}:{given['--port']}", Path(given["--ssl-ca-certfile"])
    return serve_health(address, lambda: {"supernode": is_listening(runtime, authority)})


def install(value: str, tasks: News, answers: News) -> None:
    """Let Flower's factory of web applications give guarded ones; `tasks` and `answers` as in `runtime_work`."""
    create = application.create_app

    def guarded(*args: Any, **kwargs: Any) -> Guard:  # noqa: ANN401 - Flower's own arguments
        app = create(*args, **kwargs)
        return Guard(Direct(app, runtime_work(app, "SuperNode", tasks, answers)), value)

    replace(application, {"create_app": guarded})


def look_often(pauses: Pauses, tasks: News) -> None:
    """Let Flower's loop look for messages and answers more often than every 3 and 0.5 s while a run is active.

    `tasks` rings once a message has come whole, so that its process finds all of it. Flower's loop sends one answer
    for each message that it has taken. Where a run ends while a message of it is being taken there is one more, and
    each answer would wait until the next message comes; so an answer that is there is sent without one, too.
    """
    pull, push = vars(loop)["_pull_and_store_message"], vars(loop)["_push_messages"]
    send = vars(loop)["push_object_contents_from_iterable"]

    waiting = MessageWait()

    def pulled(**options: Any) -> int | None:  # noqa: ANN401 - Flower's own arguments
        began = time.monotonic()
        receive = options["receive"] if answered_run(options["state"]) else waiting.before(options["receive"])
        run_id: int | None = pull(**options | {"receive": receive})
        if run_id is not None:
            tasks.ring()
        if run_id is not None or time.monotonic() - began > HELD_SECONDS / 2:  # what was held has waited already
            pauses.begin()
        return answered_run(options["state"]) if run_id is None else run_id

    def pushed(**options: Any) -> None:  # noqa: ANN401 - Flower's own arguments
        push(**options)
        pauses.begin()

    def sent(*args: Any, **options: Any) -> None:  # noqa: ANN401 - Flower's own arguments
        try:
            with pauses.waiting_for_parts(STALLED_SECONDS):
                send(*args, **options)
        except StalledError:
            give_up()

    replace(loop, {"_pull_and_store_message": pulled, "_push_messages": pushed, "time": pauses,
                   "push_object_contents_from_iterable": sent})  # fmt: skip


class MessageWait:
    """How a SuperNode waits for messages: by a question that the SuperLink holds, and answers with no message."""

    _is_on: ContextVar[bool] = ContextVar("waiting", default=False)

    def __init__(self) -> None:
        self._looked = time.monotonic()

    def before(self, receive: Callable[[], T | None]) -> Callable[[], T | None]:
        """Flower's `receive`, that waits first; after a wait without news it looks only every `LOOK_SECONDS`."""

        def received() -> T | None:
            began, token = time.monotonic(), self._is_on.set(True)
            try:
                found = receive()
            finally:
                self._is_on.reset(token)
            ended = time.monotonic()
            if found is not None or (ended - began >= HELD_SECONDS and ended - self._looked < LOOK_SECONDS):
                return found  # a SuperLink that holds nothing gives messages to whoever waits, too
            self._looked = ended
            return receive()

        return received

    @classmethod
    def tell(cls, request: httpx.Request) -> httpx.Request:
        """Say with a call that it waits, if it does."""
        if cls._is_on.get():
            request.headers[WAITING] = "1"
        return request


def answered_run(state: InMemoryNodeState) -> int | None:
    """The run of an answer that nobody has begun to send; None: there is none."""
    with state.lock_msg_store:
        waiting = [each.message.metadata for each in state.msg_store.values() if not each.is_retrieved]
    return next((each.run_id for each in waiting if each.reply_to_message_id), None)


def give_up() -> None:
    """End this process: Flower's would wait without end for the rest of an answer whose process has stopped.

    A process that has died is noticed there (`client.entry`), one that was frozen is not. The supervisor starts the
    SuperNode again, the coordinator asks again, and the stored answer is sent by another process.
    """
    line = (
        f"error: no part of an answer has come for {STALLED_SECONDS:g} s: its process is frozen; the SuperNode ends\n"
    )
    os.write(2, line.encode())
    os._exit(1)


def show_certificate(context: ssl.SSLContext, proxy: str) -> None:
    """Let every HTTP client that Flower makes in this process use `context` and `proxy`, and follow no redirect."""
    start = ProtobufClient.__init__

    def certified(self: ProtobufClient, base_url: str, **options: object) -> None:
        start(self, base_url, **options)  # type: ignore[arg-type]
        kept = self._client
        if proxy:
            self._client = httpx.Client(
                verify=context, timeout=kept.timeout, proxy=proxy, trust_env=False, follow_redirects=False
            )
        else:
            self._client = HttpClient(context, kept.timeout, {})  # type: ignore[assignment]
        build = self._client.build_request
        self._client.build_request = lambda *given, **named: MessageWait.tell(build(*given, **named))  # type: ignore[method-assign]
        kept.close()

    ProtobufClient.__init__ = certified  # type: ignore[method-assign]


def _file(option: str) -> Path:
    """What the command line gives for an option; the SuperNode itself checks the rest."""
    return Path(sys.argv[sys.argv.index(option) + 1])


if __name__ == "__main__":
    main()
