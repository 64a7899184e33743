"""The process of a live page: `python -I -m deploy.pages.serve MODULE HOME SOCKET`, started by `start --page-port`.

MODULE has `page(home) -> Source`. SOCKET is the number of a listening socket that `start` holds: as long as it runs
nobody else can take the port, not even while this process is started again, and wait there for the token of a browser
that comes back. The token is read from its file; no command line and no log has it.
"""

import asyncio
import importlib
import logging
import socket
import sys
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from deploy.observe.logs import set_up_logging
from deploy.pages.application import Application
from deploy.pages.token import read_token
from deploy.processes.memory_limits import limit_own_memory

MOST_CONNECTIONS = 64
PATIENCE_SECONDS = 10.0
"""How long a connection may take for its first request."""
MOST_HEADER_BYTES = 16 * 2**10


class BoundedProtocol(H11Protocol):
    """HTTP/1.1 in which nobody keeps a connection without asking, nor all of them."""

    def connection_made(self, transport: Any) -> None:  # noqa: ANN401  # a transport of uvicorn's own type
        """Take a connection, or close it at once where there are too many."""
        super().connection_made(transport)
        if len(self.connections) > MOST_CONNECTIONS:
            transport.abort()
        else:
            self.loop.call_later(PATIENCE_SECONDS, self._end_idle)

    def _end_idle(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.transport.close()


def server_of(application: Application) -> uvicorn.Server:
    """A server without logs of requests: an address line could hold what a user has pasted there."""
    return uvicorn.Server(
        uvicorn.Config(
            application,
            http=BoundedProtocol,
            ws="none",
            lifespan="off",
            loop="asyncio",
            interface="asgi3",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=5,
            timeout_graceful_shutdown=1,
            h11_max_incomplete_event_size=MOST_HEADER_BYTES,
        )
    )


def main() -> None:
    """Serve until a signal ends it."""
    module, home, number = sys.argv[1:]
    limit_own_memory("page")
    set_up_logging(quiet=("uvicorn", "asyncio"))
    place = Path(home)
    source = importlib.import_module(module).page(place)
    listening = socket.socket(fileno=int(number))
    logging.getLogger(__name__).info("live page of %s", module)
    asyncio.run(server_of(Application(source, read_token(place))).serve(sockets=[listening]))


if __name__ == "__main__":
    main()
