"""The live page among the services of a `start`."""

import contextlib
import http.client
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from deploy.observe.logs import tell
from deploy.pages.token import TOKEN_FILE, address, draw_token, read_token
from deploy.processes.process import check_port_free
from deploy.processes.services import environment
from deploy.processes.supervision import Service

ANSWER_SECONDS = 3.0
BACKLOG = 64


@contextlib.contextmanager
def page_service(home: Path, port: int, module: str) -> Iterator[Service]:
    """The page's service with a new token, and the port held on loopback as long as the block lasts.

    Args:
        home: of the coordinator or the site.
        port: on 127.0.0.1.
        module: has `page(home)`, which says what is shown.

    Raises:
        ProvisionError: the port is in use, or the token cannot be written.
    """
    check_port_free("127.0.0.1", port, "live page", home)
    with socket.create_server(("127.0.0.1", port), backlog=BACKLOG) as listening:
        draw_token(home)
        number = listening.fileno()
        argv = [sys.executable, "-I", "-m", "deploy.pages.serve", module, str(home.resolve()), str(number)]
        yield Service(
            "page",
            argv,
            environment(home / "flwr" / "page"),
            home / "logs" / "page.log",
            ready=lambda: is_answering(port),
            pass_fds=(number,),
        )


def tell_address(home: Path, port: int) -> None:
    """Say where the page is: with its token on a terminal, and without it where output may be kept as a log."""
    if sys.stdout.isatty():
        # Not by `tell`, which may be a log.
        sys.stdout.write(f"live page, for your eyes only: {address(port, read_token(home))}\n")
    else:
        tell(f"live page at http://127.0.0.1:{port}/; its token lies in {home / TOKEN_FILE}")


def is_answering(port: int) -> bool:
    """Whether the page itself answers; the port listens even while its process is away."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_SECONDS)
    try:
        connection.request("GET", "/")
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
