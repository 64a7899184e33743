"""A network's weights: fresh from a stream, from arrays, and as arrays."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from shared.diffusion.uvit import build_model
from shared.errors import InputError
from shared.experiment.config import Experiment
from shared.seeding import Streams

Arrays = dict[str, NDArray[np.generic]]


def new_model(experiment: Experiment, streams: Streams) -> nn.Module:
    """The experiment's network with initial weights from the stream `init`, whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(streams.generator("init").get_state())
        return build_model(experiment)


def empty_model(experiment: Experiment) -> nn.Module:
    """The experiment's network with whatever lies in memory, for whoever gives it all of its weights at once.

    Nothing is drawn for it, and torch's generator stays as it is. While it is made, no other thread may make a network.
    """
    with _nothing_drawn():
        network = build_model(experiment)
    assert next(network.buffers(), None) is None, "weights are all that a network has"
    return network


@contextmanager
def _nothing_drawn() -> Iterator[None]:
    """Let torch's initialisers leave every tensor as it is."""
    drawing = {name: each for name, each in vars(nn.init).items() if name.endswith("_") and not name.startswith("_")}
    vars(nn.init).update(dict.fromkeys(drawing, lambda tensor, *_, **__: tensor))
    try:
        yield
    finally:
        vars(nn.init).update(drawing)


def load_weights(model: nn.Module, arrays: Arrays) -> None:
    """Overwrite all weights of `model`.

    Raises:
        InputError: names or shapes are not those of the network; the line names the first tensor.
    """
    own = model.state_dict()
    for name in sorted(own.keys() | arrays.keys()):
        ours = tuple(own[name].shape) if name in own else "missing"
        theirs = tuple(arrays[name].shape) if name in arrays else "missing"
        if ours != theirs:
            raise InputError(
                f"weights: tensor {name!r} is {theirs} in the checkpoint, {ours} in the experiment's network; "
                "give a checkpoint of the same size, image size and patch size"
            )
    model.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in arrays.items()}, strict=True)


def to_numpy(tensor: Tensor) -> NDArray[np.generic]:
    """The tensor's values; on a CPU a view of its memory."""
    array: NDArray[np.generic] = tensor.detach().cpu().numpy()
    return array
