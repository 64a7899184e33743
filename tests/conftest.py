"""Settings of the whole suite: no network, few threads, no leftovers of the user's environment."""

import functools
import gc
import itertools
import logging
import os
import random
import resource
import signal
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
for name in ("MASKFED_SERVER_HOME", "MASKFED_CLIENT_HOME", "MASKFED_REGISTRY"):
    os.environ.pop(name, None)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what runs in the background so, and all that is started from here would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
_DRAWN = random.Random()
# What a test calls drawn by the system (keys, noise, names) is the same in each run: no bound is missed by chance.
os.urandom = random._urandom = _DRAWN.randbytes  # type: ignore[attr-defined]


def _fsync(file: Any) -> None:
    """As the system's for all that a test can see: nobody pulls the plug, so nothing has to reach the disk."""
    os.fstat(file if isinstance(file, int) else file.fileno())


# The disk would be waited for thousands of times. Programs that tests start have the real one.
os.fsync = _fsync

_MACHINES = itertools.count(1)
END_TO_END = "tests/end_to_end/"
REAL_PROCESSES = (
    "tests/deploy/pages/test_serve.py",
    "tests/deploy/processes/",
    "tests/deploy/test_",
    "tests/server/simulation/test_simulate.py",
    "tests/client/cli/test_main.py",
)
"""Files that start programs: one after the other in one process, or they would take each other's ports and time."""
FORKED = (
    "tests/benchmarks/test_benchmarks.py",
    "tests/client/test_training_request.py",
    "tests/client/training/test_local_round.py",
    "tests/server/training/test_train.py",
    "tests/shared/training/test_engine.py",
)
"""Files that use `tests/forked.py`: in one process, so that one has to load torch for them."""
SLOW = (
    END_TO_END,
    *REAL_PROCESSES,
    "tests/benchmarks/",
    "tests/client/answers/",
    "tests/client/cli/test_audit.py",
    "tests/client/cli/test_every_command.py",
    "tests/client/data/test_scan.py",
    "tests/client/offers/test_answer.py",
    "tests/client/operator/test_processing_record.py",
    "tests/client/privacy/test_canaries.py",
    "tests/client/privacy/test_dp_sgd.py",
    "tests/client/privacy/test_totality.py",
    "tests/client/records/test_kills.py",
    "tests/client/test_training_request.py",
    "tests/client/training/",
    "tests/deploy/guards/test_own_code.py",
    "tests/deploy/guards/test_sizes.py",
    "tests/golden/",
    "tests/server/alignment/test_fit.py",
    "tests/server/cli/test_boundary.py",
    "tests/server/cli/test_every_command.py",
    "tests/server/evaluation/",
    "tests/server/federation/acceptance/",
    "tests/server/federation/client_level/",
    "tests/server/federation/rounds/test_resume.py",
    "tests/server/federation/rounds/test_secure_round.py",
    "tests/server/release/",
    "tests/server/report/test_build.py",
    "tests/server/report/test_svg_charts.py",
    "tests/server/simulation/",
    "tests/server/studies/",
    "tests/server/training/",
    "tests/shared/audits/",
    "tests/shared/data/test_synthetic.py",
    "tests/shared/diffusion/test_unet.py",
    "tests/shared/evaluation/test_networks.py",
    "tests/shared/pages/test_live.py",
    "tests/shared/training/test_engine.py",
    "tests/client/simulated/",
    "tests/server/federation/rounds/test_loop.py",
    "tests/server/federation/test_evaluation_queue.py",
    "tests/shared/diffusion/test_samplers.py",
    "tests/test_api.py",
)
"""Files that train, sample, draw, start programs or take seconds otherwise; `make test-fast` leaves them out."""
LONG = (
    "tests/test_imports.py",
    "tests/client/privacy/",
    "tests/client/secure/",
    "tests/client/test_entry.py",
    "tests/server/federation/messaging/",
    "tests/shared/messages/",
)
"""Of the others, those of some seconds: at the end of a run they would keep one process busy and the rest idle."""
FULL_SIZE = (END_TO_END, "tests/server/simulation/")
"""Files whose models are trained by programs that they start, which know the real sizes only."""


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Each process of pytest-xdist begins to collect elsewhere: on a fresh clone it finds compiled what others were at.

    pytest takes 7 s to compile the tests, and without this every process would.
    """
    number = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
    tests = Path(__file__).parent
    if number.isdecimal() and [Path(each).resolve() for each in config.args] == [tests]:
        found = [path for path in sorted(tests.iterdir()) if not path.name.startswith("_")]
        found = [path for path in found if path.is_dir() or path.name.startswith("test_")]
        places = [str(path) for path in found if not pytest_ignore_collect(path, config)]
        first = places.index(str(tests / ("client", "server", "shared")[int(number) % 3]))
        config.args = places[first:] + places[:first]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`make test-fast` does not import what it leaves out."""
    name = f"{collection_path.relative_to(ROOT).as_posix()}{'/' * collection_path.is_dir()}"
    return True if config.option.markexpr == "not slow" and name.startswith(SLOW) else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Under pytest-xdist a file stays in one process, so that what its tests share is made once; the longest begin."""
    for item in items:
        file = item.nodeid.partition("::")[0]
        item.add_marker(pytest.mark.xdist_group(_group(file)))
        if file.startswith(SLOW):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: (_turn(item.nodeid), str(item.path)))


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Generator[None, object, object]:
    """What is collected stays: the garbage collector neither looks for garbage meanwhile nor goes through it later."""
    gc.disable()
    if not session.config.getoption("numprocesses", None):
        _settle_hypothesis()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.set_threshold(10_000, 20, 20)
        gc.enable()


def _settle_hypothesis() -> None:
    """The same examples each time, however long one takes on a busy machine; what only distributes tests needs none."""
    import hypothesis

    hypothesis.settings.register_profile("suite", derandomize=True, deadline=None, database=None)
    hypothesis.settings.load_profile("suite")


def pytest_collection_finish() -> None:
    """The tree of a program's commands takes 30 ms and never changes: commands that are called here share it."""
    if "typer" in sys.modules:
        import typer.main
        import typer.testing

        typer.main.get_command = typer.testing._get_command = functools.cache(typer.main.get_command)  # type: ignore[attr-defined]


def _group(file: str) -> str:
    if file.startswith(END_TO_END):
        return "end to end"
    if file.startswith(REAL_PROCESSES):
        return "real processes"
    return "forked" if file in FORKED else file


def _turn(name: str) -> int:
    """What takes longest, and mostly waits, begins: at the end short tests fill all processes."""
    order = (END_TO_END, REAL_PROCESSES, SLOW, LONG)
    return next((turn for turn, group in enumerate(order) if name.startswith(group)), len(order))


def pytest_make_parametrize_id(val: object) -> str | None:
    """Megabytes of hostile text are no name: each process sends the names of all its tests."""
    return f"{type(val).__name__} of {len(val)}" if isinstance(val, str | bytes) and len(val) > 100 else None


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """All generators of this process begin anew with each test, whatever ran before it and where."""
    seed = f"{item.path.name}::{item.name}"
    _DRAWN.seed(seed)
    random.seed(seed)
    number = random.getrandbits(32)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(number)
    if (torch := sys.modules.get("torch")) is not None:
        # Without a GPU in use: `torch.manual_seed` keeps a list of all seeds, with stacks, for one that may come.
        (torch if torch.cuda.is_initialized() else torch.default_generator).manual_seed(number)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One process more than cores: the one that starts programs waits for them, and rounds wait for deadlines."""
    return (os.cpu_count() or 1) + 1


def pytest_report_header() -> list[str]:
    """What this machine leaves out is said before the tests, in one line."""
    from tests.needs import missing_programs

    return [line for line in [missing_programs()] if line]


@pytest.fixture(autouse=True, scope="module")
def small_network(request: pytest.FixtureRequest) -> Generator[None, Any, None]:
    """Size T is a small network, but in modules with `pytestmark = pytest.mark.full_size`."""
    from tests.small_network import install

    with pytest.MonkeyPatch.context() as patch:
        if request.node.get_closest_marker("full_size") is None and not request.node.nodeid.startswith(FULL_SIZE):
            install(patch)
        yield


@pytest.fixture(autouse=True)
def full_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Single tests ask for the real size by the same mark."""
    if request.node.get_closest_marker("full_size") is not None:
        from shared.diffusion import uvit

        monkeypatch.setitem(uvit.SIZES, "T", uvit.uvit_T)


@pytest.fixture(autouse=True)
def own_machine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Each test is a machine of its own: homes of others share no images with it, limits and silence do not stay."""
    if "tmp_path" in request.fixturenames:
        registry = request.getfixturevalue("tmp_path") / "registry"
    else:  # To make a folder takes longer than most tests do.
        registry = tmp_path_factory.getbasetemp() / f"registry{next(_MACHINES)}"
    monkeypatch.setenv("MASKFED_REGISTRY", str(registry))
    memory = resource.getrlimit(resource.RLIMIT_AS)
    yield
    resource.setrlimit(resource.RLIMIT_AS, memory)
    logging.disable(logging.NOTSET)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, None]:
    """In CI nothing is skipped: where MASKFED_REQUIRE_ALL is set, a skip is a failure."""
    outcome = yield
    _refuse_skip(outcome.get_result())


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report() -> Generator[None, Any, None]:
    """The same for modules that skip themselves while they are collected."""
    outcome = yield
    _refuse_skip(outcome.get_result())


def _refuse_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.skipped and os.environ.get("MASKFED_REQUIRE_ALL") == "1":
        report.outcome = "failed"
        report.longrepr = f"MASKFED_REQUIRE_ALL is set, but this was skipped: {report.longrepr}"
