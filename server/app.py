"""The ServerApp: one process per submitted run, started by the coordinator's superexec. Never imports torch.

Its run_config has two keys: `experiment` (TOML text) and `run` (the run directory's name in the coordinator's home,
which is in the environment). Everything else is read from that directory, so a process that dies can be replaced.
"""

import contextlib
import ctypes
import errno
import fcntl
import gc
import logging
import os
import select
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from server.alignment.mean_images import MEAN_IMAGE_FILE, gather_mean_images
from server.evaluation.federated_reference import QUESTION_FILE, gather
from server.federation.evaluation_queue import Evaluations
from server.federation.fleet.registry import Registry
from server.federation.messaging.signed_grid import SignedGrid
from server.federation.messaging.transport import ExchangeError, FlowerGrid, Timing
from server.federation.offers import OFFER_FILE, gather_offers
from server.federation.rounds.loop import Rounds, RunFailedError
from server.release.audit_sites import AUDIT_FILE, gather_verdicts
from shared.errors import InputError
from shared.experiment.config import Experiment, parse_experiment
from shared.storage.runlog import RunLog

LOCK_SECONDS = 60.0
_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8
log = logging.getLogger("maskfed.server")
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Entry point that Flower calls."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    return_freed_memory()
    home = Path(os.environ["MASKFED_SERVER_HOME"])
    experiment = parse_experiment(str(context.run_config["experiment"]))
    if "MASKFED_SIMULATION" in os.environ:
        end_with(int(os.environ["MASKFED_SIMULATION_PID"]))
        enlist_virtual_sites(grid, Registry(home / "sites.json"))
    conduct(grid, home, str(context.run_config["run"]), experiment)


def end_with(pid: int) -> None:
    """End this process as soon as the process `pid` has ended, even when that was killed.

    A simulation whose command is gone would go on unseen, and keep its folder from being taken up again.
    """
    watched = os.pidfd_open(pid)

    def wait() -> None:
        select.select([watched], [], [])
        os._exit(1)

    threading.Thread(target=wait, daemon=True, name="end-with-command").start()


def enlist_virtual_sites(grid: Grid, registry: Registry) -> None:
    """Give the nodes of a simulation the aliases of their partitions: the runtime makes them in that order."""
    nodes = sorted(grid.get_nodes(), key=lambda node: node.registered_at)
    for index, node in enumerate(nodes):
        registry.set_node_id(f"site-{index}", node.node_id)


def return_freed_memory() -> None:
    """Let glibc give every freed block of 1 MB or more back at once, and keep all small ones in one arena.

    Models come and go in pieces of 5 MB; by default glibc learns to keep such pieces, and every reply is fetched by new
    threads, each with its own arena of leftovers: the process then grows with the number of replies
    (`benchmarks.memory`). Elsewhere than on glibc this does nothing.

    Responses of the HTTP client are reference cycles of 5 MB, which the garbage collector counts like any small object:
    it is made to look often, and only at what was made since the start.
    """
    gc.freeze()
    gc.set_threshold(100, 1, 1)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**20)
        mallopt(_M_ARENA_MAX, 1)


def conduct(grid: FlowerGrid, home: Path, run: str, experiment: Experiment, timing: Timing | None = None) -> None:
    """Run the rounds that are left of `home`/runs/`run`, and write how it ended.

    Raises:
        RunFailedError: the run failed; Flower then reports it as failed, too.
        InputError: the run directory does not fit the request.
    """
    folder = home / "runs" / run
    with _only_one(folder):
        metrics = RunLog(folder / "metrics.jsonl")
        try:
            signed = SignedGrid(grid, home, run)
            stored = parse_experiment((folder / "experiment.toml").read_text(encoding="utf-8"), name="experiment.toml")
            if stored != experiment:
                raise InputError(f"run {run}: the submitted experiment is not the one in its directory: resume it")
            if (folder / QUESTION_FILE).exists():
                gather(signed, home, folder, experiment, timing)
                return
            if (folder / MEAN_IMAGE_FILE).exists():
                gather_mean_images(signed, home, folder, timing)
                return
            if (folder / AUDIT_FILE).exists():
                gather_verdicts(signed, home, folder, timing)
                return
            if (folder / OFFER_FILE).exists():
                gather_offers(signed, home, folder, timing)
                return
            evaluations = Evaluations(folder, experiment.evaluation.every_rounds, metrics)
            with contextlib.closing(evaluations):
                registry = Registry(home / "sites.json")
                rounds = Rounds(
                    signed,
                    experiment,
                    run=run,
                    run_folder=folder,
                    registry=registry,
                    observer=evaluations,
                    timing=timing,
                )
                model = rounds.finish()
                evaluations.finish()
            metrics.write_durably("end", status="completed", round=model.server_round)
        except BaseException as error:
            _write_end(metrics, error)
            raise


def _write_end(metrics: RunLog, error: BaseException) -> None:
    """Say why, and whether trying again may help; a full disk must not hide the first error."""
    if type(error).__name__ == "RunNotRunningException":
        status, is_final = "stopped", True
    else:
        status = "failed"
        is_final = isinstance(error, InputError) or getattr(error, "is_final", False) or _is_disk_full(error)
        if not isinstance(error, RunFailedError | InputError | ExchangeError | OSError):
            log.error("the run failed", exc_info=error)
    with contextlib.suppress(OSError):
        metrics.write_durably("end", status=status, reason=f"{error}"[:2000] or type(error).__name__, is_final=is_final)


def _is_disk_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """One process per run: a predecessor that the SuperLink has given up may still be ending."""
    if not folder.is_dir():
        raise InputError(f"run directory {folder} does not exist: `maskfed-server finetune` makes it")
    deadline = time.monotonic() + LOCK_SECONDS
    with (folder / "lock").open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise RunFailedError(f"run in {folder} is already being worked on", is_final=False) from error
                time.sleep(0.5)
        yield
