"""The page of a run of 2,000 rounds and 5 sites: processor seconds and peak memory of `maskfed-server report`.

Needed: at most 3 s and 200 MB. Its figures are invented, its fields are those of a run; half of the sites' charges are
private, every hundredth round has a distance.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.measure import verdict, without_options
from benchmarks.scratch import scratch
from server.runs.run_directory import RunDir, create
from shared.experiment.config import parse_experiment
from shared.storage.runlog import RunLog

ROUNDS, SITES = 2000, 5
NEEDED_SECONDS, NEEDED_MB = 3.0, 200.0
SEED = 0
PROGRAM = """
import time
from contextlib import suppress
from pathlib import Path
from server.cli.main import main
with suppress(SystemExit):
    main()
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(time.process_time(), peak.split()[1])
"""
"""The command, and what it took; the kernel's account of a child would begin with the memory of its parent."""


def main() -> int:
    """Write the record, then the page of it."""
    with scratch() as folder:
        run = create(folder / "runs" / "long", parse_experiment(f"[federation]\nrounds = {ROUNDS}\n"))
        write_record(RunLog(run.metrics))
        seconds, peak_mb = measured(run.path)
        size_mb = run.metrics.stat().st_size / 1e6
    text = f"{ROUNDS} rounds of {SITES} sites, {size_mb:.1f} MB: {seconds:.1f} processor s (limit {NEEDED_SECONDS:g}), "
    is_reached = seconds <= NEEDED_SECONDS and peak_mb <= NEEDED_MB
    return verdict("report", f"{text}{peak_mb:.0f} MB (limit {NEEDED_MB:g})", reached=is_reached)


def write_record(log: RunLog) -> None:
    """What a run with so many rounds leaves."""
    log.write("start", round=0, rounds=ROUNDS, run="long")
    for number in range(1, ROUNDS + 1):
        answered = [answer(number, site) for site in range(SITES)]
        nobody: dict[str, list[Any]] = {state: [] for state in ("refused", "failed", "late", "lost", "rejected")}
        asked, seconds = [each["site"] for each in answered], {"train": 30.0, "aggregate": 0.2, "checkpoint": 0.1}
        log.write("round", round=number, asked=asked, answered=answered, **nobody, weights_changed=True,
                  update_norm=1 / number, bytes_up=13_500_000 * SITES, bytes_down=13_500_000 * SITES,
                  seconds={**seconds, "total": 30.3})  # fmt: skip
        if number % 100 == 0:
            log.write("evaluation", round=number, metrics={"fd_random_inception_192": 0.2 + 1 / number})
    log.write("end", status="completed", reason="")


def answer(number: int, site: int) -> dict[str, Any]:
    """One site's part of a round."""
    entry = {"site": f"site-{site}", "weight": 1, "bytes": 13_500_000, "seconds": 29.0 + site, "norm": 1.0,
             "scalars": {"loss": 0.3 + 1 / (number + site)}, "ledger_sequence": number}  # fmt: skip
    private = {"epsilon": 8 * (number / ROUNDS) ** 0.5, "delta": 1e-5, "epsilon_cap": 8.0, "unit": "person"}
    return entry | (private if site % 2 else {})


def measured(run: Path) -> tuple[float, float]:
    """Processor seconds and peak resident MB of the command in a process of its own, which must succeed."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "report", str(run)], capture_output=True, text=True, check=True
    )
    if not RunDir(run).report.is_file():
        raise RuntimeError(f"no page was made: {done.stdout}{done.stderr}")
    seconds, peak_kb = done.stdout.split()[-2:]
    return float(seconds), int(peak_kb) * 1024 / 1e6


if __name__ == "__main__":
    sys.exit(without_options(main, __doc__))
