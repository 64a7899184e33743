"""The plan of a run: what stays as it was from the offer to the last round, and its digest. No torch."""

import hashlib

from shared.experiment.config import Experiment
from shared.messages.training import RequestHeader
from shared.storage.files import canonical_json


def resolve(experiment: Experiment) -> Experiment:
    """Decide what is left open, once per run: `auto` precision is float32, which every site can repeat exactly.

    The digest that a site approves is that of the resolved experiment.
    """
    if experiment.train.precision != "auto":
        return experiment
    train = experiment.train.model_copy(update={"precision": "float32"})
    return experiment.model_copy(update={"train": train})


def plan_digest(header: RequestHeader) -> str:
    """SHA-256 of all that must stay as it was in a run's first request: experiment, precision, tensors."""
    fixed = header.model_dump(mode="json", include={"experiment", "precision", "manifest", "base_digest"})
    return hashlib.sha256(canonical_json(fixed)).hexdigest()


def offer_digest(run: str, plan: str, *, is_over: bool = False) -> str:
    """Names an offer: run and digest of its plan, whichever round of it comes next."""
    return hashlib.sha256(canonical_json([run, plan, is_over])).hexdigest()
