"""What one site does in a round: units, signal to noise, bytes, hours.

Signal to noise: the clipped gradients of B units agree to a share r of their norm C (their coherence), so the sum has a
signal of r B C, and noise of norm sigma C sqrt(d) for d trained values; averaging N sites divides the noise by sqrt(N).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from shared.experiment.config import Experiment
from shared.experiment.federation import FederationConfig
from shared.updates.wire_sizes import wire_bytes

COHERENCE = 0.5
"""r of model T from the shipped model, all tensors or attention alone (measured 0.52 and 0.56); less after longer
training, an assumption for every other model."""
DP_SLOWDOWN = 1.7
"""DP-SGD against the plain step on a CPU (benchmarks.dp_step)."""
BUFFERS = {"fedavg": 0, "fedavgm": 1, "fedadam": 2}
"""Arrays as large as the model that the server's optimizer keeps."""


@dataclass(frozen=True)
class Workload:
    """One site's round."""

    units_per_step: float
    """Units (images without DP) that a step has on average."""
    signal_to_noise: float | None
    """Of one step averaged over the sites, at coherence `COHERENCE`; None without DP."""
    trained_values: int
    megabytes_per_round: float
    """Sent and received."""
    megabytes_sent: float
    """Of these the update's."""
    images_per_round: float
    images_per_second: float
    """A plain step of this machine."""
    seconds_per_round: float


def workload(experiment: Experiment, num_sites: int, units: int, sizes: tuple[int, int], rate: float) -> Workload:
    """The figures of a plan.

    Args:
        experiment: the plan.
        num_sites: that answer in each round.
        units: training images or persons of a site.
        sizes: values of the whole model, and trained ones.
        rate: images a second of a plain step.
    """
    privacy, federation = experiment.privacy, experiment.federation
    is_private = privacy.mechanism != "none"
    batch = privacy.sample_rate * units if is_private else float(experiment.train.batch)
    images = federation.local_steps * batch * (privacy.draws if is_private else 1)
    sent = update_bytes(sizes[1], federation)
    noise = privacy.noise_multiplier * math.sqrt(sizes[1] / num_sites)
    return Workload(
        units_per_step=batch,
        signal_to_noise=COHERENCE * batch / noise if is_private else None,
        trained_values=sizes[1],
        megabytes_per_round=(wire_bytes(sizes[1], federation.weights_dtype) + sent) / 1e6,
        megabytes_sent=sent / 1e6,
        images_per_round=images,
        images_per_second=rate,
        seconds_per_round=images / rate * (DP_SLOWDOWN if is_private else 1),
    )


def update_bytes(num_values: int, federation: FederationConfig) -> int:
    """Of one update as it travels, masked or not."""
    if federation.secure:
        return num_values * federation.secure_bits // 8
    return wire_bytes(num_values, federation.wire_dtype)


def lines(experiment: Experiment, work: Workload, num_sites: int) -> Iterator[str]:
    """The figures in words."""
    rounds = experiment.federation.rounds
    if work.signal_to_noise is not None:
        yield (
            f"units in a step: {work.units_per_step:.0f} on average, the plan divides by "
            f"{experiment.privacy.expected_batch}"
        )
        yield (
            f"signal to noise of one step, averaged over {num_sites} sites: {work.signal_to_noise:.2g}, if the "
            f"gradients of units agree to {COHERENCE:g} of their norm (so on model T from the shipped model)"
        )
    yield (
        f"bytes: {work.trained_values:,} trained values, {work.megabytes_per_round:.1f} MB for each site and round "
        f"({work.megabytes_sent:.1f} of it sent), {work.megabytes_per_round * num_sites * rounds / 1e3:.2f} GB in all"
    )
    yield (
        f"time at this machine's speed ({work.images_per_second:.1f} images per second): "
        f"{duration(work.seconds_per_round)} of training for each site and round, "
        f"{duration(work.seconds_per_round * rounds)} in all"
    )


def run_bytes(experiment: Experiment, model_bytes: int) -> int:
    """What the checkpoints of a federated run take on the coordinator's disk at most, the one being written as well.

    Args:
        experiment: says how many are kept, and what the server's optimizer keeps.
        model_bytes: of all weights once; a checkpoint has them, their average and the optimizer's buffers.
    """
    train, federation = experiment.train, experiment.federation
    marked = federation.rounds // train.keep_every if train.keep_every else 0
    kept = min(federation.rounds + 1, train.keep_last + marked) + 1
    return kept * (2 + BUFFERS[federation.server_optimizer]) * model_bytes


def duration(seconds: float) -> str:
    """A length of time with the unit that suits it."""
    for limit, size, unit in ((120, 1, "seconds"), (7200, 60, "minutes"), (172_800, 3600, "hours")):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86_400:.0f} days"
