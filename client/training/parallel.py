"""A plain round on several GPUs of the site: one process per GPU inside the round, gone when it ends."""

import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import multiprocessing

from client.home import Home
from client.private_files import private_files
from shared.messages.training import TrainRequest
from shared.training.processes import joined_world

Update = tuple[NDArray[np.float32], dict[str, float]]


def num_processes(request: TrainRequest, device: torch.device) -> int:
    """GPUs that share a plain round: as many as divide its batch; private rounds and CPUs take one process."""
    train = request.header.experiment.train
    if device.type != "cuda" or request.header.experiment.privacy.mechanism != "none":
        return 1
    micro_batch = train.batch // train.accumulation
    return max(count for count in range(1, torch.cuda.device_count() + 1) if micro_batch % count == 0)


def run_in_processes(work: Callable[..., Update], arguments: tuple[object, ...], home: Home, processes: int) -> Update:
    """Run `work(*arguments, world)` in `processes` processes, one per GPU; the update and scalars of the first.

    Args:
        work: a function of a module, since each process imports it anew.
        arguments: what it takes before the `World` of its process.
        home: where the folder of the result may lie.
        processes: how many.

    Raises:
        RuntimeError: a process failed; the others were ended.
    """
    with private_files(), tempfile.TemporaryDirectory(dir=home.path, prefix="round-") as folder:
        result = Path(folder) / "update.npz"
        of_rank = (work, arguments, processes, _free_port(), result)
        multiprocessing.spawn(_run_rank, of_rank, nprocs=processes)  # type: ignore[attr-defined, no-untyped-call]
        with np.load(result, allow_pickle=False) as stored:
            return stored["update"], {"loss": float(stored["loss"]), "grad_norm": float(stored["grad_norm"])}


def _run_rank(
    rank: int, work: Callable[..., Update], arguments: tuple[object, ...], processes: int, port: int, result: Path
) -> None:
    os.environ |= {"WORLD_SIZE": str(processes), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with joined_world() as world:
        update, scalars = work(*arguments, world)
        if world.is_main:
            np.savez(result, update=update, loss=scalars["loss"], grad_norm=scalars["grad_norm"])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
