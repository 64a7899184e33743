"""Server optimizers and the moving average across rounds: pure functions on flat float32 arrays.

Reddi et al., Adaptive Federated Optimization (arXiv 2003.00295), Algorithm 2; FedAvgM after Hsu et al. (1909.06335).
`delta` is the mean update of the sites (after minus before), so the pseudo-gradient is its negative.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from shared.experiment.federation import FederationConfig

Flat = NDArray[np.float32]
CHUNK_ELEMENTS = 2**20


@dataclass(frozen=True)
class ServerState:
    """What the server optimizer carries from round to round; `steps` counts rounds that changed the weights."""

    steps: int = 0
    buffers: dict[str, Flat] = field(default_factory=dict)
    """`momentum` (fedavgm, fedadam) and `square` (fedadam), each (num_elements,)."""


def apply_update(weights: Flat, delta: Flat, state: ServerState, config: FederationConfig) -> tuple[Flat, ServerState]:
    """New weights and state after one round; `weights`, `delta` and the buffers of `state` are consumed (reused).

    fedavg:  x <- x + eta delta
    fedavgm: m <- beta m + delta;  x <- x + eta m
    fedadam: m <- b1 m + (1 - b1) delta;  v <- b2 v + (1 - b2) delta^2;  x <- x + eta_s m / (sqrt(v) + tau) with the
             bias correction eta_s = eta sqrt(1 - b2^(s+1)) / (1 - b1^(s+1)), s = rounds so far including this one.
    """
    steps = state.steps + 1
    names = _BUFFERS[config.server_optimizer]
    buffers = {name: state.buffers[name] if name in state.buffers else np.zeros_like(weights) for name in names}
    for start in range(0, len(weights), CHUNK_ELEMENTS):
        part = slice(start, start + CHUNK_ELEMENTS)
        step = _step(delta[part], {name: buffer[part] for name, buffer in buffers.items()}, steps, config)
        weights[part] += step
    return weights, ServerState(steps, buffers)


def ema_decay(decay: float, local_steps: int, total_local_steps: int) -> float:
    """Decay of one round: that of a step, with warm-up min(d, (1 + s) / (10 + s)), to the power of the round's steps.

    Args:
        decay: d, per optimizer step.
        local_steps: steps that each site did in the round.
        total_local_steps: s, steps since the run began, this round's included.
    """
    warm = min(decay, (1 + total_local_steps) / (10 + total_local_steps))
    return float(warm**local_steps)


def average(ema: Flat, weights: Flat, decay: float) -> Flat:
    """`decay * ema + (1 - decay) * weights`, in place in `ema`."""
    for start in range(0, len(ema), CHUNK_ELEMENTS):
        part = slice(start, start + CHUNK_ELEMENTS)
        ema[part] += np.float32(1 - decay) * (weights[part] - ema[part])
    return ema


_BUFFERS = {"fedavg": (), "fedavgm": ("momentum",), "fedadam": ("momentum", "square")}


def _step(delta: Flat, buffers: dict[str, Flat], steps: int, config: FederationConfig) -> Flat:
    eta, beta_1, beta_2 = config.server_step, config.server_momentum, config.server_beta_2
    match config.server_optimizer:
        case "fedavg":
            return np.float32(eta) * delta
        case "fedavgm":
            momentum = buffers["momentum"]
            momentum *= np.float32(beta_1)
            momentum += delta
            return np.float32(eta) * momentum
        case "fedadam":
            momentum, square = buffers["momentum"], buffers["square"]
            momentum += np.float32(1 - beta_1) * (delta - momentum)
            square += np.float32(1 - beta_2) * (np.square(delta) - square)
            eta_s = eta * np.sqrt(1 - beta_2 ** (steps + 1)) / (1 - beta_1 ** (steps + 1))
            scaled = np.float32(eta_s) * momentum
            scaled /= np.sqrt(square) + np.float32(config.server_tau)
            return scaled
