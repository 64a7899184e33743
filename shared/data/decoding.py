"""Decodes many files at once into rows of one file, on all cores; what is done is known after a crash.

Processes, not threads: Pillow holds the interpreter lock for most of the work on small pictures.
"""

import errno
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from shared.data.images import ImageSource, list_images
from shared.data.pixels import UnreadableImageError, decode
from shared.errors import InputError
from shared.storage.files import write_atomically

CHUNK_IMAGES = 256
# Starting a process costs about as much as decoding this many small images; below it threads do.
PROCESSES_FROM_IMAGES = 4_000
SAVE_EVERY_SECONDS = 2.0
PENDING, DECODED, UNREADABLE = 0, 1, 2
MAX_UNREADABLE = 0.01
"""Share of unreadable files above which a build has to be asked for."""

OnProgress = Callable[[int, int], None]
"""Called with files done and files in all."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DecodeJob:
    """What a worker process needs to know: source as it was listed, side and crop in pixels, and the two files."""

    source: str
    fingerprint: str
    size: int
    crop: int
    images_path: str
    state_path: str


class _Decoder:
    """One worker: turns rows of the source into rows of the images file."""

    def __init__(self, job: DecodeJob, source: ImageSource) -> None:
        self.job, self.source = job, source
        self.descriptor = os.open(job.images_path, os.O_WRONLY)

    def decode_rows(self, rows: NDArray[np.int64]) -> list[str]:
        """Decode some files; returns for each an empty string, or why it is unreadable."""
        return [self._decode_row(row) for row in rows.tolist()]

    def _decode_row(self, row: int) -> str:
        try:
            pixels = decode(self.source.read(self.source.names[row]), self.job.size, self.job.crop)
        except UnreadableImageError as error:
            return str(error) or type(error).__name__
        except MemoryError as error:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM), self.source.names[row]) from error
        except OSError as error:
            # The machine's fault and perhaps over tomorrow: never a fact about the picture.
            raise OSError(error.errno, error.strerror or str(error), self.source.names[row]) from error
        _write_at(self.descriptor, pixels.tobytes(), row * pixels.nbytes)
        return ""


def decode_files(
    job: DecodeJob, source: ImageSource, state: NDArray[np.uint8], workers: int, on_progress: OnProgress | None
) -> None:
    """Decode every file that `state` calls pending into the images file, row k being file k of the source.

    Args:
        job: what to decode; its images file exists in full length.
        source: the listed files.
        state: (num_files,) PENDING, DECODED or UNREADABLE; updated in place, and on disk every few seconds.
        workers: processes, or threads for few files.
        on_progress: told files done and in all.

    Raises:
        InputError: the machine could not read a file or write its pixels; what is done stays done.
    """
    pending = np.flatnonzero(state == PENDING)
    chunks = (pending[start : start + CHUNK_IMAGES] for start in range(0, len(pending), CHUNK_IMAGES))
    saved = time.monotonic()
    with Path(job.images_path).open("rb") as images, _workers(job, source, workers, len(pending)) as submit:
        try:
            for rows, problems in _in_flight(submit, chunks, 2 * workers):
                _note(source, state, rows, problems)
                if on_progress:
                    on_progress(int(np.count_nonzero(state)), len(state))
                if time.monotonic() - saved > SAVE_EVERY_SECONDS:
                    _save_state(images, job, state)
                    saved = time.monotonic()
        except (OSError, BrokenExecutor) as error:
            raise InputError(f"images {job.source}: {_cause(error)}; the same command goes on from here") from error
        finally:
            _save_state(images, job, state)


def _cause(error: OSError | BrokenExecutor) -> str:
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}: the build has stopped, cure that"
    return "a decoding process was killed, perhaps for want of memory: give fewer --workers"


def check_readable(job: DecodeJob, state: NDArray[np.uint8], *, allow_unreadable: bool) -> None:
    """Refuse a build that lost its images; what was decoded is kept for the same command with the switch.

    Raises:
        InputError: nothing decodes, or more than `MAX_UNREADABLE` does not and that is not allowed.
    """
    lost, total = int(np.count_nonzero(state == UNREADABLE)), len(state)
    if lost == total:
        raise InputError(f"images {job.source}: none of {total} files decodes; give readable pictures")
    if lost > MAX_UNREADABLE * total and not allow_unreadable:
        raise InputError(
            f"images {job.source}: {lost} of {total} files are unreadable ({lost / total:.1%}, more than "
            f"{MAX_UNREADABLE:.0%}), each is named above; repair or remove them, or make a cache that leaves them out "
            f"with `maskfed-server data cache {job.source} --size {job.size} --allow-unreadable` and give that "
            "(at a site: `maskfed-client data scan --allow-unreadable`)"
        )


def make_rows(images: Path, count: int, row_bytes: int) -> None:
    """Make the images file in full length.

    Raises:
        InputError: it does not fit here; nothing is left.
    """
    try:
        with images.open("wb") as file:
            file.truncate(count * row_bytes)
    except (OSError, OverflowError) as error:
        images.unlink(missing_ok=True)
        reason = error.strerror if isinstance(error, OSError) else "File too large"
        raise InputError(
            f"cache folder {images.parent}: {reason}: {count:,} images need {count * row_bytes:,} bytes; "
            "lower --size or name another folder"
        ) from error


def close_gaps(images: Path, good: NDArray[np.int64], row_bytes: int) -> None:
    """Move the rows `good` to the front of the images file, in order, and cut it there."""
    with images.open("r+b") as file:
        for target, row in enumerate(good.tolist()):
            if target != row:
                _write_at(file.fileno(), os.pread(file.fileno(), row_bytes, row * row_bytes), target * row_bytes)
        file.truncate(len(good) * row_bytes)
        os.fsync(file.fileno())


Submit = Callable[[NDArray[np.int64]], "Future[list[str]]"]


def _in_flight(
    submit: Submit, chunks: Iterator[NDArray[np.int64]], limit: int
) -> Iterator[tuple[NDArray[np.int64], list[str]]]:
    # A few chunks ahead keep all workers busy, and an interrupt waits for no more than those.
    running: dict[Future[list[str]], NDArray[np.int64]] = {}
    for rows in chunks:
        running[submit(rows)] = rows
        if len(running) == limit:
            yield from _finished(running)
    while running:
        yield from _finished(running)


def _finished(running: "dict[Future[list[str]], NDArray[np.int64]]") -> Iterator[tuple[NDArray[np.int64], list[str]]]:
    for future in wait(running, return_when=FIRST_COMPLETED).done:
        yield running.pop(future), future.result()


def _note(source: ImageSource, state: NDArray[np.uint8], rows: NDArray[np.int64], problems: list[str]) -> None:
    for row, problem in zip(rows.tolist(), problems, strict=True):
        state[row] = UNREADABLE if problem else DECODED
        if problem:
            log.warning("unreadable image %s: %s", source.names[row], problem)


def _write_at(descriptor: int, data: bytes, place: int) -> None:
    while data:
        # A disk that is nearly full takes a part, and says so only by the count.
        written = os.pwrite(descriptor, data, place)
        data, place = data[written:], place + written


def _save_state(images: BinaryIO, job: DecodeJob, state: NDArray[np.uint8]) -> None:
    # Pixels first: a row whose state says "decoded" must be on disk.
    os.fsync(images.fileno())
    write_atomically(Path(job.state_path), state.tobytes())


_decoder: _Decoder | None = None


def _start_process(job: DecodeJob) -> None:
    global _decoder  # noqa: PLW0603 - the pool gives its processes no other place for what they keep
    # Ctrl-C reaches the whole group; the parent alone decides how to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _decoder = _Decoder(job, list_images(Path(job.source)))


def _decode_in_process(rows: NDArray[np.int64]) -> list[str]:
    assert _decoder is not None
    if _decoder.source.fingerprint != _decoder.job.fingerprint:
        # Row k would be another file here than in the parent.
        raise OSError(errno.ESTALE, "the folder changed while it was read", _decoder.job.source)
    return _decoder.decode_rows(rows)


@contextmanager
def _workers(job: DecodeJob, source: ImageSource, workers: int, pending: int) -> Iterator[Submit]:
    if workers > 1 and pending >= PROCESSES_FROM_IMAGES:
        context = multiprocessing.get_context("spawn")
        pool: Executor
        with ProcessPoolExecutor(workers, context, initializer=_start_process, initargs=(job,)) as pool:
            yield lambda rows: pool.submit(_decode_in_process, rows)
        return
    decoder = _Decoder(job, source)
    try:
        with ThreadPoolExecutor(workers) as pool:
            yield lambda rows: pool.submit(decoder.decode_rows, rows)
    finally:
        os.close(decoder.descriptor)
