"""`python -m benchmarks [NAME ...]`: run benchmarks, by default all that need no GPU, and rewrite the table.

One that cannot run here says so by an exit status of its own (77), and leaves the figure of another machine as it is.

A name with options, as one argument, is a row of its own: `python -m benchmarks "chaos --kills 100"`.
"""

import datetime
import importlib
import inspect
import os
import pkgutil
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType

import benchmarks
from benchmarks.measure import UNMEASURED, hardware
from benchmarks.scratch import ended_by_signals
from server.runs.child_process import dies_with_parent
from shared.storage.versions import git_commit

PAGE = Path(__file__).parent / "BENCHMARKS.md"
HEAD = """# Benchmarks

Written by `make bench` (`python -m benchmarks`); do not edit by hand. Each figure is the last line of its command.
What is measured and how stands in [README.md](README.md) and at the top of each module. n counts timed rounds.

"""
COLUMNS = ("name", "figure", "command", "commit", "hardware", "date", "n", "seed")
Row = tuple[str, ...]
NOT_MEASURED = "not measured"
ENVIRONMENT = dict(os.environ)
"""As this command got it: modules that `discover` imports set variables for themselves, such as numbers of threads."""


def main(arguments: list[str]) -> int:
    """Run the named benchmarks and write the page.

    Returns:
        0 when every figure is reached, 1 when one is short, 77 when none is but some cannot be measured here, 2 for an
        unknown name.
    """
    modules = discover()
    if unknown := sorted({module_name(argument) for argument in arguments} - set(modules)):
        print(f"error: no benchmark {unknown[0]!r}: there are {', '.join(modules)}", file=sys.stderr)
        return 2
    chosen = arguments or [name for name, module in modules.items() if not getattr(module, "NEEDS_GPU", False)]
    rows, failed, unmeasured = read_rows(PAGE), [], []
    for name in chosen:
        status, figure = run(name)
        row = make_row(name, modules[module_name(name)], figure)
        if status == UNMEASURED:
            unmeasured.append(row[0])
        else:
            rows[row[0]] = row
            failed += [row[0]] if status else []
        PAGE.write_text(render({key: rows.get(key) for key in row_names(modules, rows)}), encoding="utf-8")
    print(
        f"{len(chosen) - len(failed) - len(unmeasured)} of {len(chosen)} figures reached"
        + (f"; short: {', '.join(failed)}" if failed else "")
        + (f"; not measured here: {', '.join(unmeasured)}" if unmeasured else "")
    )
    if failed:
        return 1
    return UNMEASURED if unmeasured else 0


def discover() -> dict[str, ModuleType]:
    """Every module of this package with a `main` that needs no arguments, by name; the others are parts of these."""
    found = [module for module in pkgutil.iter_modules(benchmarks.__path__) if module.name != "__main__"]
    # A package of several modules is run by its own `__main__`.
    paths = {module.name: f"{module.name}.__main__" if module.ispkg else module.name for module in found}
    modules = {name: importlib.import_module(f"benchmarks.{path}") for name, path in sorted(paths.items())}
    return {name: module for name, module in modules.items() if is_benchmark(module)}


def is_benchmark(module: ModuleType) -> bool:
    """Whether `main()` can be called as it is."""
    main = getattr(module, "main", None)
    needed = inspect.signature(main).parameters.values() if main else ()
    return main is not None and all(parameter.default is not parameter.empty for parameter in needed)


def row_names(modules: Iterable[str], rows: Mapping[str, Row]) -> list[str]:
    """Rows of the page: what is measured; of modules of which nothing is, their name and whatever was listed."""
    listed = {row for row in rows if module_name(row) in set(modules)} | set(modules)
    measured = {row for row in listed if row in rows and rows[row][1] != NOT_MEASURED}
    return sorted(measured | {row for row in listed if module_name(row) not in map(module_name, measured)})


def module_name(row: str) -> str:
    """The module of a row: its first word."""
    return row.split(maxsplit=1)[0]


def run(name: str) -> tuple[int, str]:
    """Exit status and last line of one benchmark, in a process that ends with this one; its output is passed on."""
    print(f"== {name}", flush=True)
    module, *options = shlex.split(name)
    command = [sys.executable, "-m", f"benchmarks.{module}", *options]
    last = ""
    with ended_by_signals(), subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=PAGE.parent.parent, env=ENVIRONMENT,
        preexec_fn=dies_with_parent(),  # noqa: PLW1509  # its one system call is safe
    ) as process:  # fmt: skip
        try:
            for line in process.stdout or ():
                print(line, end="", flush=True)
                last = line.strip() or last
        except SystemExit:
            process.terminate()  # and wait for it: it takes down what it has built
            raise
    return process.returncode, last or f"failed with exit status {process.returncode}"


def make_row(name: str, module: ModuleType, figure: str) -> Row:
    """One line of the table, for a run of just now; of files among the options only the name is kept."""
    name = " ".join(Path(word).name for word in shlex.split(name))
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    rounds, seed = str(getattr(module, "ROUNDS", "-")), str(getattr(module, "SEED", "-"))
    command, commit = f"`python -m benchmarks.{name}`", (git_commit() or "-")
    cells = (name, figure, command, commit[:10] + commit[40:], hardware(), today, rounds, seed)
    return tuple(cell.replace("|", "/") for cell in cells)


def read_rows(page: Path) -> dict[str, Row]:
    """Rows of an earlier run: what is not run again stays."""
    lines = page.read_text(encoding="utf-8").splitlines() if page.exists() else []
    rows = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines if line.startswith("| ")]
    return {row[0]: row for row in rows if len(row) == len(COLUMNS) and row[0] not in ("name", "---")}


def render(rows: dict[str, Row | None]) -> str:
    """The page; a benchmark without a row is not measured."""
    lines = [COLUMNS, ("---",) * len(COLUMNS)]
    for name, row in rows.items():
        lines.append(row or (name, NOT_MEASURED, f"`python -m benchmarks.{name}`", *("-",) * 5))
    return HEAD + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
