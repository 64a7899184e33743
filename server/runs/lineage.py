"""What sites have been charged for images that a training saw: it stays with the weights, however often they go on.

Public images that were aligned with the sites' mean images know something of the sites. Whoever trains on them, or goes
on from weights that were, must be able to say so, with the epsilon. No names of sites: cards are public.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from shared.errors import InputError
from shared.experiment.config import Section
from shared.storage.files import write_atomically

CHARGES_FILE = "charged.json"
"""Beside the images of an aligned set."""
PROVENANCE = "mean_images"
"""Where checkpoints keep it."""


class MeanImageCharge(Section):
    """One question for mean images: what it cost each site that answered."""

    run: str = Field(max_length=200)
    num_sites: int = Field(gt=0)
    unit: Literal["image", "person"]
    noise_multiplier: float = Field(gt=0, allow_inf_nan=False)
    delta: float = Field(gt=0, lt=1)
    epsilon: float = Field(gt=0)
    """Of the mean image alone; a site's ledger adds up whatever else it gave."""


_LIST = TypeAdapter(tuple[MeanImageCharge, ...])


def write_charges(images: Path, charges: Iterable[MeanImageCharge]) -> None:
    """Write down beside a set of images what it cost."""
    write_atomically(images / CHARGES_FILE, _LIST.dump_json(tuple(charges), indent=2).decode() + "\n")


def charges_of_images(images: Path) -> tuple[MeanImageCharge, ...]:
    """What a set of images cost; nothing for ordinary images.

    Raises:
        InputError: the record is damaged.
    """
    path = images / CHARGES_FILE
    if not path.is_file():
        return ()
    try:
        return _LIST.validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise InputError(f"{path} is damaged: restore it from a copy, or align the images again") from error


def charges_of_weights(provenance: Mapping[str, Any]) -> tuple[MeanImageCharge, ...]:
    """What weights stand on, by the provenance of their checkpoint.

    Raises:
        InputError: the record is damaged.
    """
    try:
        return _LIST.validate_python(provenance.get(PROVENANCE, ()))
    except ValidationError as error:
        raise InputError(f"a checkpoint's record of {PROVENANCE} is damaged: restore it from a copy") from error


def as_provenance(*charges: Iterable[MeanImageCharge]) -> dict[str, Any]:
    """The provenance of weights that stand on all of these, each question once; empty for none."""
    told = {each.model_dump_json(): each for some in charges for each in some}
    return {PROVENANCE: [each.model_dump(mode="json") for each in told.values()]} if told else {}
