"""`python -m benchmarks.open_door start --home FOLDER`: a coordinator whose door has no limits, Flower without guards.

Only to show that an attack works where what stops it is off, so that holding elsewhere says something.
"""

from pathlib import Path

from benchmarks.unguarded import flowers_own
from deploy.processes import nginx, services
from server.cli import main as program

OPEN = {
    "ssl_verify_client on;": "",
    "ssl_crl ": "# ssl_crl ",
    "ssl_handshake_timeout 5s;": "",
    "client_header_timeout 5s;": "client_header_timeout 15s;",
    "client_max_body_size 4k;": "client_max_body_size 8m;",
    "client_max_body_size 256k;": "client_max_body_size 8m;",
    "client_body_buffer_size 5184k;": "client_body_buffer_size 8m;",
}
MOST_OF_AN_ADDRESS = 2**16 - 1
"""What nginx takes as a limit: more than there are."""
CONNECTIONS = 512
"""Of nginx as a whole, its default and the door's before it had limits."""


def open_configuration(home: Path, port: int, superlink_port: int, **limits: int) -> Path:
    """The door's configuration without what keeps strangers out."""
    path = write_configuration(home, port, superlink_port, **limits | {"connections": MOST_OF_AN_ADDRESS})
    text = path.read_text(encoding="utf-8")
    for closed, opened in OPEN.items():
        if closed not in text:
            raise RuntimeError(f"the configuration has no {closed!r}")
        text = text.replace(closed, opened)
    path.write_text(text, encoding="utf-8")
    return path


if __name__ == "__main__":
    write_configuration, nginx.MOST_CONNECTIONS = nginx.write_configuration, CONNECTIONS
    nginx.write_configuration = open_configuration
    services.guarded = flowers_own
    services.SETTLE_SECONDS = 1e9
    program.main()
