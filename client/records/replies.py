"""The last reply of each run, kept so that the same request is answered with the same bytes: one charge, one noise."""

import io
import os
import shutil
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from client.private_files import write_private
from shared.errors import InputError
from shared.messages.statistics import MeanImageAnswer
from shared.messages.training import ReplyHeader, TrainReply

AnswerHeader = TypeVar("AnswerHeader", ReplyHeader, MeanImageAnswer)
MOST_RUNS = 4
"""Runs whose last reply is kept; a reply is as large as the model."""


def keep_reply(folder: Path, run: str, reply: TrainReply) -> None:
    """Store a trained reply (0600) under the digest of its request, in place of the run's one before.

    Raises:
        OSError: the disk is full; nothing half-written is left.
    """
    assert reply.update is not None
    keep_answer(folder, run, reply.header, reply.update)


def keep_answer(folder: Path, run: str, header: AnswerHeader, array: NDArray[Any]) -> None:
    """Store header and array of any charged answer as `keep_reply` does.

    Raises:
        OSError: the disk is full; nothing half-written is left.
    """
    head = io.BytesIO()
    head.write(header.model_dump_json().encode() + b"\n")
    array = np.ascontiguousarray(array)
    np.lib.format.write_array_header_1_0(head, np.lib.format.header_data_from_array_1_0(array))
    own = folder / run
    path = own / f"{header.request_digest}.reply"
    # The array is as large as the model, and no second one is held of it.
    write_private(path, head.getvalue(), array.reshape(-1).view(np.uint8).data)
    # Also what kills in the middle of a write have left; the ledger's lock keeps other writers away.
    for other in own.iterdir():
        if other != path:
            other.unlink()
    os.utime(own)
    runs = sorted((each for each in folder.iterdir() if each.is_dir()), key=lambda each: each.stat().st_mtime)
    for old in runs[:-MOST_RUNS]:
        shutil.rmtree(old)


def find_reply(folder: Path, run: str, request_digest: str) -> TrainReply | None:
    """The stored reply to exactly this request, if it is still there."""
    found = find_answer(folder, run, request_digest, ReplyHeader)
    return None if found is None else TrainReply(*found)


def find_answer(
    folder: Path, run: str, request_digest: str, kind: type[AnswerHeader]
) -> tuple[AnswerHeader, NDArray[Any]] | None:
    """Header and array of the stored answer to exactly this request, if it is still there.

    Raises:
        InputError: the file is damaged.
    """
    path = folder / run / f"{request_digest}.reply"
    if not path.exists():
        return None
    try:
        with path.open("rb") as file:
            return kind.model_validate_json(file.readline()), np.lib.format.read_array(file, allow_pickle=False)
    except ValueError as error:
        raise InputError(f"{path} is damaged: remove it, the round is then charged again") from error
