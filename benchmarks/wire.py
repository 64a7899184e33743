"""A large model over the wire: bytes, seconds and peak memory of every process, float32 against bfloat16.

Default: the S model at 64 px (44 M), 2 sites, 2 rounds. `--size L --sites 1 --rounds 1 --dtypes float32 --wavelet`
is one round of the L model on wavelet bands of 256 px (232 M, 0.93 GB); all processes together need about 17 GB.
"""

import argparse
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.local import LocalFederation, federation, make_experiment, program_of, random_checkpoint
from benchmarks.measure import verdict
from benchmarks.memory import peak_rss_gb
from server.runs.run_directory import RunDir
from shared.storage.runlog import read_metrics


def main(arguments: Sequence[str] = ()) -> int:
    """Print bytes, seconds and memory for each wire dtype, then the verdict."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="S")
    parser.add_argument("--sites", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--wavelet", action="store_true", help="256 px as Haar bands, as in the paper's L model")
    options = parser.parse_args(arguments)
    image_size = 256 if options.wavelet else 64
    sizes, costs = {}, []
    with federation(options.sites, image_size, 4) as local:
        for dtype in options.dtypes:
            text = f"""
            [train]
            batch = 1
            [model]
            size = "{options.size}"
            image_size = {image_size}
            [data]
            wavelet = "{"haar" if options.wavelet else ""}"
            [federation]
            rounds = {options.rounds}
            local_steps = 1
            min_available = {options.sites}
            min_replies = {options.sites}
            wire_dtype = "{dtype}"
            """
            experiment = make_experiment(text)
            init = random_checkpoint(local.root / "init", experiment)
            peaks = Peaks(local)
            local.finetune(init, experiment, dtype)
            highest = peaks.stop()
            sizes[dtype], seconds = report(local, dtype, highest)
            costs.append(f"{dtype} rounds of {max(seconds):.0f} s, {describe(highest)}")
    first, *others = [sum(size) for size in sizes.values()]
    shares = [other / first for other in others]
    figure = f"{first / 1e6:.0f} MB in {options.dtypes[0]}" + "".join(f", {share:.3f} of that" for share in shares)
    figure = "; ".join([figure, *costs])
    return verdict(
        f"bytes of {options.rounds} rounds, {options.size}", figure, reached=all(share < 0.505 for share in shares)
    )


def report(local: LocalFederation, run: str, peaks: dict[str, float]) -> tuple[tuple[int, int], list[float]]:
    """Print what a run cost; bytes down and up, and the seconds of each round."""
    rounds = [event for event in read_metrics(RunDir(local.home / "runs" / run).metrics) if event["kind"] == "round"]
    sent, received = (sum(event[key] for event in rounds) for key in ("bytes_sent", "bytes_received"))
    seconds = [event["seconds"]["total"] for event in rounds]
    print(f"{run}: {sent / 1e6:.1f} MB down, {received / 1e6:.1f} MB up, rounds of {seconds} s")
    for event in rounds:
        print(f"  seconds by stage: {event['seconds']}")
    print(f"  {describe(peaks)}")
    return (sent, received), seconds


def describe(peaks: dict[str, float]) -> str:
    """Highest memory of each program that runs Flower's parts."""
    parts = [f"{name} {peak:.2f}" for name, peak in sorted(peaks.items()) if name.startswith(("flwr-", "flower-super"))]
    return f"peak GB: {', '.join(parts)}"


@dataclass
class Peaks:
    """Highest resident memory of any process of each program while it runs, sampled in a thread."""

    local: LocalFederation
    peaks: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def stop(self) -> dict[str, float]:
        """GB by program."""
        self._ended.set()
        self._thread.join()
        return self.peaks

    def _sample(self) -> None:
        while not self._ended.is_set():
            for group in self.local.processes().values():
                for process in group:
                    name = program_of(process)
                    self.peaks[name] = max(self.peaks.get(name, 0.0), peak_rss_gb(process.pid))
            time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
