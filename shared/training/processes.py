"""The processes of one training: alone, or started together by torchrun."""

import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from shared.errors import InputError
from shared.storage.chunks import rank_from_environment


@dataclass(frozen=True)
class World:
    """This process among `size`; rank 0 writes files and talks to the user."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0

    def split(self, batch: int, accumulation: int) -> int:
        """Images per optimizer step of this process.

        Raises:
            InputError: the batch cannot be split evenly over processes and micro-batches.
        """
        parts = self.size * accumulation
        if batch % parts:
            raise InputError(
                f"train.batch {batch} is not a multiple of {self.size} processes x {accumulation} micro-batches: "
                f"give {max(1, round(batch / parts)) * parts} for example"
            )
        return batch // self.size

    def any(self, is_true: bool) -> bool:
        """Whether it is true in any process; every process has to ask."""
        if self.size == 1:
            return is_true
        flag = torch.tensor(float(is_true), device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def joined_world() -> Iterator[World]:
    """The world that torchrun's environment describes, or a world of one; GPUs with NCCL, CPUs with gloo.

    Raises:
        InputError: variables of the environment that no torchrun sets.
    """
    rank = rank_from_environment()
    size, local_rank = rank.count, rank.local_index
    if torch.cuda.is_available() and local_rank >= torch.cuda.device_count():
        raise InputError(
            f"LOCAL_RANK is {local_rank}, {torch.cuda.device_count()} GPUs are there: start as many processes as GPUs"
        )
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size == 1:
        yield World(device=device)
        return
    _meet("nccl" if device.type == "cuda" else "gloo", size)
    try:
        yield World(dist.get_rank(), size, device)
    finally:
        dist.destroy_process_group()


def _meet(backend: str, size: int) -> None:
    """Join the other processes at the address that torchrun names.

    Raises:
        InputError: it names none, or nobody is there.
    """
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise InputError(
                f"WORLD_SIZE is {size} and {name} is not set: start the command by torchrun, or unset both"
            )
    try:
        # PyTorch would look for a name that nobody has for half an hour.
        socket.getaddrinfo(os.environ["MASTER_ADDR"], None)
        dist.init_process_group(backend)
    except (RuntimeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"the {size} processes of WORLD_SIZE do not meet ({reason}): start them by torchrun"
        ) from error


def named_device(name: str) -> torch.device:
    """The device that a user names: `cpu`, `cuda` or `cuda:<index>`.

    Raises:
        InputError: another name, or a GPU that is not there.
    """
    match = re.fullmatch(r"cpu|cuda(?::(\d{1,4}))?", name)
    if match is None:
        raise InputError(f"device {name[:40]!r} is unknown: give cpu, cuda or cuda:<index>")
    found = torch.cuda.device_count() if name != "cpu" and torch.cuda.is_available() else 0
    if name != "cpu" and int(match[1] or 0) >= found:
        there = f"{found} GPUs are there, counted from 0" if found else "PyTorch finds no GPU here"
        raise InputError(f"device {name!r}: {there}; give cpu, or leave the option out")
    return torch.device(name)
