"""Seconds of a round without training: 3 sites, TLS, tiny model, sites that re-send the reply they stored.

The same run is asked for again under the same name, so each site answers from its store: processes start, messages
travel, replies are folded, a checkpoint is written, but nobody imports torch. Needed: at most 10 s on 4 idle cores.
"""

import statistics
import sys
from collections.abc import Sequence

from benchmarks.local import federation, make_experiment, random_checkpoint
from benchmarks.measure import verdict
from server.runs.run_directory import RunDir
from shared.storage.runlog import read_metrics

NEEDED_SECONDS = 10.0
ROUNDS = 5
EXPERIMENT = "[federation]\nrounds = 1\nlocal_steps = 1\nmin_available = 3\n[train]\nbatch = 2\n"


def main(_arguments: Sequence[str] = ()) -> int:
    """Print the stages of the median round, then the verdict."""
    with federation(3) as local:
        experiment = make_experiment(EXPERIMENT)
        init = random_checkpoint(local.root / "init", experiment)
        records = []
        for index in range(ROUNDS + 1):
            local.finetune(init, experiment, "overhead")
            run = local.home / "runs" / "overhead"
            (record,) = [event for event in read_metrics(RunDir(run).metrics) if event["kind"] == "round"]
            records.append(record)
            run.rename(run.with_name(f"overhead-{index}"))
        print(f"with training and import of torch: {records[0]['seconds']['total']:.1f} s")
    seconds = [record["seconds"] for record in records[1:]]
    for stage in seconds[0]:
        print(f"  {stage}: {statistics.median(each[stage] for each in seconds):.2f} s")
    middle = statistics.median(each["total"] for each in seconds)
    return verdict(
        "round overhead, 3 sites", f"{middle:.1f} s (limit {NEEDED_SECONDS:g})", reached=middle <= NEEDED_SECONDS
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
