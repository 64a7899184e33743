"""The processes of one training: alone, or started together by torchrun."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from shared.errors import InputError


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
    """The world that torchrun's environment describes, or a world of one; GPUs with NCCL, CPUs with gloo."""
    size, local_rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size == 1:
        yield World(device=device)
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), size, device)
    finally:
        dist.destroy_process_group()
