"""The coordinator's hand on the SuperLink: site registration and runs. Uses flwr internals.

Written against flwr 1.42.0 exactly; `tests/server/federation/fleet/test_superlink.py` fails on another version.
"""

import hashlib
import hmac
import os
import ssl
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

import httpx
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    StreamLogsRequest,
    UnregisterNodeRequest,
)
from flwr.proto.federation_config_pb2 import SimulationConfig
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.error import FlowerError
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from server.federation.fleet.code_bundle import SITES, VIRTUAL_SITES, BundleError, build_bundle
from server.federation.fleet.registry import Site, check_home
from server.federation.fleet.superlink_types import ControlError, Node, Simulation, SubmittedRun
from shared.experiment.config import Experiment

FLWR_VERSION = "1.42.0"
READY_DEADLINE_SECONDS = 60.0
CALL_SECONDS = 30.0
CALLER_HEADER, _CALLER_PURPOSE = "maskfed-caller", b"maskfed calls of control and runtime paths"


def wait_ready(address: str, root_certificate: Path | None, deadline_seconds: float = READY_DEADLINE_SECONDS) -> None:
    """Wait until the SuperLink at `address` ("host:port") answers its health check.

    Raises:
        ControlError: it does not within the deadline.
    """
    verify = ssl.create_default_context(cafile=str(root_certificate)) if root_certificate else True
    url = f"{'https' if root_certificate else 'http'}://{address}/health"
    deadline = time.monotonic() + deadline_seconds
    with httpx.Client(verify=verify, timeout=2, trust_env=False) as http:
        while time.monotonic() < deadline:
            try:
                if http.get(url).is_success:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)
    raise ControlError(f"the SuperLink at {address} does not answer after {deadline_seconds:g} s: see its log")


class Control:
    """A connection to the SuperLink's Control API; close it, an open one delays the SuperLink's exit by 15 s."""

    def __init__(
        self, address: str, root_certificate: Path | None, secret: bytes, timeout_seconds: float = CALL_SECONDS
    ) -> None:
        self.address = address
        self._http = ControlHttpClient.from_server_address(
            server_address=address,
            insecure=root_certificate is None,
            root_certificates=root_certificate.read_bytes() if root_certificate else None,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
        )
        # Flower's client asks proxy variables even for loopback and sends no secret.
        self._http._client.close()
        self._http._client = httpx.Client(
            verify=ssl.create_default_context(cafile=str(root_certificate)) if root_certificate else True,
            timeout=timeout_seconds,
            headers={CALLER_HEADER: caller_value(secret)},
            trust_env=False,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Drop the connection."""
        self._http.close()

    def register(self, site: Site) -> int:
        """Register a site's public key under its alias; the node id, the old one if the key is known already.

        Raises:
            ControlError: the SuperLink refuses the key.
        """
        key = node_key(site.public_key)
        for node in self.nodes():
            if node.public_key == key and node.status != "unregistered":
                return node.node_id
        with _errors(f"registering site {site.alias}"):
            return int(self._http.RegisterNode(RegisterNodeRequest(public_key=key, name=site.alias)).node_id)

    def unregister(self, node_id: int) -> None:
        """Remove a node: it gets no further message and its connection is refused."""
        with _errors(f"removing node {node_id}"):
            self._http.UnregisterNode(UnregisterNodeRequest(node_id=node_id))

    def nodes(self) -> list[Node]:
        """All nodes, unregistered ones too."""
        with _errors("listing nodes"):
            found = self._http.ListNodes(ListNodesRequest()).nodes_info
        return [Node(node.node_id, node.name, node.status, node.public_key) for node in found]

    def submit(self, experiment: Experiment, run: str, simulation: Simulation | None = None) -> int:
        """Start a ServerApp for the prepared run directory `run`; its Flower run id."""
        try:
            content = build_bundle(SITES if simulation is None else VIRTUAL_SITES)
        except BundleError as error:
            raise ControlError(str(error)) from error
        request = StartRunRequest(
            fab=fab_to_proto(Fab(hashlib.sha256(content).hexdigest(), content, {})),
            override_config=user_config_to_proto({"experiment": experiment.to_toml(), "run": run}),
        )
        if simulation is not None:
            limits = SimulationConfig(
                num_supernodes=simulation.num_sites,
                client_resources_num_cpus=simulation.cpus_per_site,
                client_resources_num_gpus=simulation.gpus_per_site,
                init_args_num_cpus=simulation.num_cpus,
                init_args_num_gpus=simulation.num_gpus,
            )
            request.override_federation_config.CopyFrom(limits)
        with _errors(f"submitting run {run}"):
            reply = self._http.StartRun(request)
        if not reply.HasField("run_id"):
            raise ControlError(f"the SuperLink refused run {run}: {reply.note or 'no reason given'}")
        return int(reply.run_id)

    def run_state(self, run_id: int) -> SubmittedRun:
        """State of a run; `unknown` for one that the SuperLink does not know (any more)."""
        try:
            with _errors(f"asking for run {run_id}"):
                found = self._http.ListRuns(ListRunsRequest(run_id=run_id)).run_dict
        except ControlError as error:
            if not isinstance(error.__cause__, httpx.HTTPStatusError) or error.__cause__.response.status_code >= 500:
                raise
            return SubmittedRun(run_id, "unknown", str(error), 0, 0)
        if run_id not in found:
            return SubmittedRun(run_id, "unknown", "the SuperLink does not know this run", 0, 0)
        run = found[run_id]
        status = run.status.status
        if status == "finished":
            status = f"finished:{run.status.sub_status}"
        return SubmittedRun(run_id, status, run.status.details, run.bytes_sent, run.bytes_recv)

    def stop(self, run_id: int) -> bool:
        """Stop a run; false when it was not running."""
        with _errors(f"stopping run {run_id}"):
            return bool(self._http.StopRun(StopRunRequest(run_id=run_id)).success)

    def logs(self, run_id: int) -> Iterator[str]:
        """The ServerApp's output from the start, and on until the run ends."""
        with _errors(f"reading the log of run {run_id}"):
            for part in self._http.StreamLogs(StreamLogsRequest(run_id=run_id, after_timestamp=0.0)):
                yield part.log_output


def connect(home: Path, timeout_seconds: float = CALL_SECONDS) -> Control:
    """Control of the SuperLink that belongs to the coordinator home `home`; each call ends after `timeout_seconds`.

    Raises:
        ControlError: its secret cannot be read.
    """
    try:
        secret = (home / "superexec.secret").read_bytes()
    except OSError as error:
        raise ControlError(
            f"{home / 'superexec.secret'}: {error.strerror}: run this as the coordinator's user"
        ) from error
    return Control(superlink_address(home), home / "pki" / "ca.crt", secret, timeout_seconds)


def caller_value(secret: bytes) -> str:
    """What the SuperLink's guard expects of whoever calls control and runtime paths: an HMAC-SHA256 in hexadecimal."""
    return hmac.new(secret, _CALLER_PURPOSE, hashlib.sha256).hexdigest()


def superlink_address(home: Path) -> str:
    """Loopback address of the home's SuperLink, "host:port" from `coordinator.toml`."""
    check_home(home)
    settings = tomllib.loads((home / "coordinator.toml").read_text(encoding="utf-8-sig"))
    return f"127.0.0.1:{settings['port']}"


def node_key(public_key: str) -> bytes:
    """The SuperLink's form of an OpenSSH public key."""
    return public_key_to_bytes(load_ssh_public_key(public_key.encode()))  # type: ignore[arg-type]


class _errors:  # noqa: N801  # used as a keyword
    """Turns what the HTTP client raises into one `ControlError` line."""

    def __init__(self, doing: str) -> None:
        self.doing = doing

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(value, httpx.HTTPStatusError):
            known = FlowerError.from_json(value.response.text)
            reason = f"{known.message} {known.public_details or ''}".strip() if known else str(value)
            raise ControlError(f"{self.doing}: {reason}") from value
        if isinstance(value, httpx.TransportError):
            raise ControlError(f"{self.doing}: the SuperLink cannot be reached ({value}); run `start`") from value
