"""The SuperNode behind its guard: `python -I -m deploy.guards.supernode ...` with `flower-supernode`'s arguments.

Its own port has runtime paths only, for the site's superexec and its processes; they show the site's secret value.
Its calls to the coordinator show the certificate that lies beside the node key, go through the proxy that MASKFED_PROXY
names and through no other.
"""

import os
import ssl
import sys
from pathlib import Path

import flwr.supernode.main as application
import httpx
from flwr.supercore.protobuf.client import ProtobufClient
from flwr.supernode.cli import flower_supernode

from deploy.guards import replace
from deploy.guards.asgi import Guard
from deploy.guards.calls import caller_value
from deploy.identity.addresses import PROXY_VARIABLE
from deploy.identity.keys import ProvisionError
from deploy.identity.tls import client_context
from deploy.observe.scrubber import scrub_journal


def main() -> None:
    """Put the guard in place and run the SuperNode."""
    scrub_journal()
    os.umask(0o077)
    try:
        value = caller_value(_file("--superexec-auth-secret-file"))
        context = client_context(_file("--root-certificates"), _file("--auth-supernode-private-key"))
    except (ProvisionError, ValueError) as error:
        sys.exit(f"error: the SuperNode does not start without its secret, key and certificate: {error}")
    install(value)
    show_certificate(context, os.environ.get(PROXY_VARIABLE, ""))
    sys.argv[0] = "flower-supernode"
    flower_supernode()


def install(value: str) -> None:
    """Let Flower's factory of web applications give guarded ones."""
    create = application.create_app
    replace(application, {"create_app": lambda *args, **kwargs: Guard(create(*args, **kwargs), value)})


def show_certificate(context: ssl.SSLContext, proxy: str) -> None:
    """Let every HTTP client that Flower makes in this process use `context` and `proxy`, and follow no redirect."""
    start = ProtobufClient.__init__

    def certified(self: ProtobufClient, base_url: str, **options: object) -> None:
        start(self, base_url, **options)  # type: ignore[arg-type]
        kept = self._client
        self._client = httpx.Client(
            verify=context, timeout=kept.timeout, proxy=proxy or None, trust_env=False, follow_redirects=False
        )
        kept.close()

    ProtobufClient.__init__ = certified  # type: ignore[method-assign]


def _file(option: str) -> Path:
    """What the command line gives for an option; the SuperNode itself checks the rest."""
    return Path(sys.argv[sys.argv.index(option) + 1])


if __name__ == "__main__":
    main()
