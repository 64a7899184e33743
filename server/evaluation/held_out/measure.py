"""`python -m server.evaluation.held_out.measure FOLDER`: the process of the held-out check; it reads and writes files.

Exit code 2: the images or the checkpoint cannot be used.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from server.evaluation.held_out.round_losses import HeldOut
from server.evaluation.held_out.suspects import find_suspects
from server.federation.acceptance.bound import worst_rise
from server.federation.acceptance.check import ANSWER_FILE, BAD_INPUT, QUESTION_FILE, CheckQuestion
from server.federation.acceptance.kept_replies import StoredReplies
from server.federation.updates.aggregation import FixedPointSum
from server.federation.updates.global_model import GlobalModel, load_global
from server.federation.updates.server_optimizer import ServerState, apply_update
from shared.data.image_cache import open_images
from shared.diffusion.uvit import build_model
from shared.errors import InputError
from shared.experiment.config import Experiment
from shared.messages.packing import unpack
from shared.storage.checkpoint import load_group, load_meta
from shared.storage.files import write_atomically
from shared.training.weights import Arrays, load_weights

SEARCH_SECONDS = 1200.0
"""How long suspects are looked for: that the round is undone must not wait for their names for ever."""


class Measured:
    """The network of a run with whatever weights, on its held-out images."""

    def __init__(self, experiment: Experiment, images: str) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.held_out = HeldOut(experiment, open_images(images, experiment.model.image_size), device)
        self.network = build_model(experiment).to(device).eval()

    def losses(self, tensors: Arrays) -> dict[str, float]:
        """Held-out losses of these weights."""
        load_weights(self.network, tensors)
        return self.held_out.losses(self.network)


def answer(question: CheckQuestion) -> dict[str, Any]:
    """Losses of the checkpoint, and suspects when they have jumped and the updates are kept.

    Raises:
        InputError: images or checkpoint cannot be used.
    """
    checkpoint = Path(question.checkpoint)
    measured = Measured(load_meta(checkpoint).experiment, question.images)
    losses = measured.losses(load_group(checkpoint, "model"))
    suspects: list[str] = []
    if question.before and question.replies and worst_rise(question.before, losses).ratio > question.bound:
        suspects = _suspects(question, measured)
    return {"losses": losses, "suspects": suspects}


def weights_after(start: GlobalModel, total: FixedPointSum, experiment: Experiment) -> Arrays:
    """All tensors after a round that begins at `start` and has this sum; neither is changed."""
    state = ServerState(start.optimizer.steps, {name: each.copy() for name, each in start.optimizer.buffers.items()})
    delta = total.mean(total.total_weight)
    weights, _ = apply_update(start.weights.copy(), delta, state, experiment.federation)
    return {**unpack(start.base, start.base_manifest), **unpack(weights, start.manifest)}


class _TooLongError(Exception):
    pass


def _suspects(question: CheckQuestion, measured: Measured) -> list[str]:
    experiment = load_meta(Path(question.checkpoint)).experiment
    start = load_global(Path(question.start), experiment)
    deadline = time.monotonic() + SEARCH_SECONDS

    def losses_after(total: FixedPointSum) -> dict[str, float]:
        if time.monotonic() > deadline:
            raise _TooLongError
        return measured.losses(weights_after(start, total, experiment))

    stored = StoredReplies(Path(question.replies), experiment.federation.wire_dtype)
    try:
        return find_suspects(stored, len(start.weights), losses_after, question.before or {}, question.bound)
    except _TooLongError:
        return []


def main(arguments: list[str]) -> int:
    """Answer the question in a folder."""
    folder = Path(arguments[0])
    try:
        question = CheckQuestion(**json.loads((folder / QUESTION_FILE).read_text(encoding="utf-8")))
        write_atomically(folder / ANSWER_FILE, json.dumps(answer(question)) + "\n")
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
