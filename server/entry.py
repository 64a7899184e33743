"""The process of a run: it runs this installation's ServerApp and nothing from a bundle.

Written against flwr 1.42.0; `tests/server/test_entry.py` fails on another. Whoever could submit a bundle would else be
the coordinator: its files, keys and models are in reach of this process. So the bundle is not even unpacked.
"""

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from queue import Queue
from typing import Any

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"

from flwr.app import Context, Message
from flwr.serverapp import Grid
from flwr.supercore.logger import mirror_output_to_queue, restore_output
from flwr.supercore.tls import validate_and_resolve_root_certificates
from flwr.superlink.grid import HttpGrid

import server.app
from server.federation.fleet.allowances import Allowances
from server.federation.messaging.transport import ExchangeError
from server.federation.rounds.giving_up import RunFailedError
from shared.errors import InputError

FLWR_VERSION = "1.42.0"
runtime = importlib.import_module("flwr.superlink.runtime.run_serverapp")  # a function of that name hides the module
RUN_CONFIG = frozenset({"experiment", "run"})
LARGEST_VARIABLE = "MASKFED_LARGEST_MESSAGE_BYTES"
"""Read before a message is inflated, by the guard in whose process this runs."""
HEADER_BYTES = 2**20
"""What a reply may have beside its arrays."""


class GuardedGrid(HttpGrid):
    """Flower's Grid that notes for each question, before it is sent, who may answer and with how much."""

    reply_bytes = 0

    def allow(self, reply_bytes: int) -> None:
        """Say how many bytes of arrays the answers to the next questions have."""
        self.reply_bytes = reply_bytes
        os.environ[LARGEST_VARIABLE] = str(reply_bytes + HEADER_BYTES)

    def _try_push_messages(self, run_id: int, messages: Iterable[Message]) -> list[str]:
        questions = list(messages)
        allowances = Allowances(Path(os.environ["MASKFED_SERVER_HOME"]), run_id)
        allowances.grant(
            {message.metadata.message_id: message.metadata.dst_node_id for message in questions},
            self.reply_bytes + HEADER_BYTES,
        )
        return super()._try_push_messages(run_id, questions)


def main() -> None:
    """Run Flower's server process with the guards in place."""
    os.umask(0o077)
    install_guards()
    options = read_options(sys.argv[1:])
    sys.argv[0] = "flwr-serverapp"
    output: Queue[str | None] = Queue()
    mirror_output_to_queue(output)  # `status --log` shows it
    runtime.run_serverapp(
        runtime_api_address=options.runtime_api_address,
        log_queue=output,
        token=options.token,
        insecure=options.insecure,
        certificates=validate_and_resolve_root_certificates(options.root_certificates, options.insecure),
        parent_pid=options.parent_pid,
        runtime_dependency_install=False,
    )
    restore_output()


def read_options(arguments: list[str]) -> argparse.Namespace:
    """What the superexec says; Flower's own parser would load the SuperLink with it."""
    parser = argparse.ArgumentParser(prog="server.entry")
    for name in ("--runtime-api-address", "--token"):
        parser.add_argument(name, required=True)
    parser.add_argument("--parent-pid", type=int, required=True)
    parser.add_argument("--insecure", action="store_true")
    parser.add_argument("--root-certificates")
    return parser.parse_args(arguments)


def install_guards() -> None:
    """Replace the parts of Flower's runtime that would unpack and import what the bundle brings."""
    guards = {
        "HttpGrid": GuardedGrid,
        "install_from_fab": lambda *_, **__: None,
        "get_fab_metadata": lambda _: ("maskfed/maskfed", "0"),
        "get_project_dir": lambda *_: Path("/nonexistent"),
        "get_project_config": lambda _: {"tool": {"flwr": {"app": {"components": {"serverapp": "server.app:app"}}}}},
        "get_fused_config_from_dir": lambda _, override: run_config(override),
        "run_": run_installed,
    }
    for name, guard in guards.items():
        if name not in vars(runtime):
            raise RuntimeError(f"Flower has no {name} here: this guard is written for {FLWR_VERSION}")
        setattr(runtime, name, guard)


def run_config(override: dict[str, Any]) -> dict[str, Any]:
    """The two keys that the ServerApp reads; nothing else of a submitted configuration."""
    return {key: value for key, value in override.items() if key in RUN_CONFIG}


def run_installed(grid: Grid, context: Context, **_bundle: object) -> Context:
    """Run the ServerApp that is installed here, whatever the bundle names."""
    try:
        server.app.app(grid=grid, context=context)
    except (InputError, RunFailedError, ExchangeError, MemoryError, OSError) as error:
        flower = logging.getLogger("flwr")
        flower.error("the run ends: %s", server.app.reason_of(error))
        flower.addFilter(says_something_new)
        raise
    return context


def says_something_new(record: logging.LogRecord) -> bool:
    """False for what Flower adds to an error that was told: a traceback, and exit code 201 with a page about bugs."""
    return record.exc_info is None and not record.getMessage().startswith("Exit Code")


if __name__ == "__main__":
    main()
