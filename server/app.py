"""The ServerApp: one process per submitted run, started by the coordinator's superexec. Never imports torch.

Its run_config has two keys: `experiment` (TOML text) and `run` (the run directory's name in the coordinator's home,
which is in the environment). Everything else is read from that directory, so a process that dies can be replaced.
"""

import contextlib
import ctypes
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
from server.evaluation.masked_reference import gather_sum
from server.federation.evaluation_queue import Evaluations
from server.federation.fleet.registry import Registry
from server.federation.messaging.signed_grid import SignedGrid
from server.federation.messaging.transport import ExchangeError, FlowerGrid, Timing, is_transient
from server.federation.offers import OFFER_FILE, gather_offers
from server.federation.rounds.giving_up import RunFailedError
from server.federation.rounds.loop import Rounds
from server.release.audit_sites import AUDIT_FILE, gather_verdicts
from shared.errors import InputError
from shared.experiment.config import Experiment, parse_experiment
from shared.storage.checkpoint import list_checkpoints
from shared.storage.room import SPARE_BYTES, patiently
from shared.storage.runlog import RunLog

LOCK_SECONDS = 60.0
PARAMETERS_VARIABLE = "MASKFED_PARAMETERS"
"""Read where `maskfed-server start` runs: limits of memory follow from it."""
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
    """Run the rounds that are left of `home`/runs/`run`, and write how it ended; a full disk is waited for.

    Raises:
        RunFailedError: the run failed; Flower then reports it as failed, too.
        InputError: the run directory does not fit the request.
    """
    folder = home / "runs" / run
    with _only_one(folder):
        metrics = RunLog(folder / "metrics.jsonl")
        try:
            signed = SignedGrid(grid, home, run)

            def work() -> None:
                # After a full disk from the beginning, as after a crash: sites send their stored replies again.
                _work(signed, home, folder, experiment, metrics, timing)

            patiently(work, folder, _most_bytes(folder), log.warning, attend=lambda: _is_still_wanted(grid))
        except BaseException as error:
            _write_end(metrics, error)
            raise


def _work(
    signed: SignedGrid, home: Path, folder: Path, experiment: Experiment, metrics: RunLog, timing: Timing | None
) -> None:
    """The question that lies in the run directory, or else its rounds."""
    stored = parse_experiment((folder / "experiment.toml").read_text(encoding="utf-8"), name="experiment.toml")
    if stored != experiment:
        raise InputError(f"run {folder.name}: the submitted experiment is not the one in its directory: resume it")
    if (folder / QUESTION_FILE).exists():
        (gather_sum if experiment.federation.secure else gather)(signed, home, folder, experiment, timing)
    elif (folder / MEAN_IMAGE_FILE).exists():
        gather_mean_images(signed, home, folder, timing)
    elif (folder / AUDIT_FILE).exists():
        gather_verdicts(signed, home, folder, timing)
    elif (folder / OFFER_FILE).exists():
        gather_offers(signed, home, folder, timing)
    else:
        _do_rounds(signed, home, folder, experiment, metrics, timing)


def _do_rounds(
    signed: SignedGrid, home: Path, folder: Path, experiment: Experiment, metrics: RunLog, timing: Timing | None
) -> None:
    evaluations = Evaluations(folder, experiment.evaluation.every_rounds, metrics)
    with contextlib.closing(evaluations):
        registry = Registry(home / "sites.json")
        rounds = Rounds(
            signed,
            experiment,
            run=folder.name,
            run_folder=folder,
            registry=registry,
            observer=evaluations,
            timing=timing,
        )
        model = rounds.finish()
        evaluations.finish()
    metrics.write_durably("end", status="completed", round=model.server_round)


def _most_bytes(folder: Path) -> int:
    """What a run writes at once: a checkpoint like its newest."""
    checkpoints = list_checkpoints(folder / "checkpoints")
    files = checkpoints[-1].glob("*") if checkpoints else ()
    return SPARE_BYTES + sum(file.stat().st_size for file in files)


def _is_still_wanted(grid: FlowerGrid) -> None:
    """Raises what Flower does once the operator has stopped the run; a SuperLink that is away says nothing."""
    try:
        list(grid.get_nodes())
    except Exception as error:
        if not is_transient(error):
            raise


def _write_end(metrics: RunLog, error: BaseException) -> None:
    """Say why, and whether trying again may help; a full disk must not hide the first error."""
    if type(error).__name__ == "RunNotRunningException":
        status, is_final = "stopped", True
    else:
        status = "failed"
        is_final = isinstance(error, InputError) or getattr(error, "is_final", False)
        if not isinstance(error, RunFailedError | InputError | ExchangeError | OSError | MemoryError):
            log.error("the run failed", exc_info=error)
    with contextlib.suppress(OSError):
        metrics.write_durably("end", status=status, reason=reason_of(error), is_final=is_final)


def reason_of(error: BaseException) -> str:
    """One line for the operator."""
    if isinstance(error, MemoryError):
        return (
            f"its process may not have more memory: the limit follows {PARAMETERS_VARIABLE}, the largest model's size"
        )
    return f"{error}"[:2000] or type(error).__name__


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
