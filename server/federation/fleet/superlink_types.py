"""What the coordinator knows of its SuperLink: nodes, runs, and the limits of a simulated federation."""

from dataclasses import dataclass


class ControlError(RuntimeError):
    """The SuperLink refused a request or cannot be reached; the text is one line for the operator."""


@dataclass(frozen=True)
class Node:
    """A registered node as the SuperLink sees it."""

    node_id: int
    alias: str
    status: str
    """`registered`, `online`, `offline` or `unregistered`."""
    public_key: bytes


@dataclass(frozen=True)
class Simulation:
    """Limits of a simulated federation."""

    num_sites: int
    cpus_per_site: int
    gpus_per_site: float
    num_cpus: int
    num_gpus: int


@dataclass(frozen=True)
class SubmittedRun:
    """A submitted run as the SuperLink sees it."""

    run_id: int
    status: str
    """`pending`, `starting`, `running`, `finished:completed`, `finished:failed`, `finished:stopped` or `unknown`."""
    details: str
    bytes_sent: int
    bytes_received: int

    @property
    def is_finished(self) -> bool:
        """Nothing more will come; `unknown` is what a SuperLink says that lost its memory."""
        return self.status.startswith("finished:") or self.status == "unknown"
