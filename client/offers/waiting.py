"""Experiments that wait for the operator's word: who asked and when, and what differs from the recipes he knows."""

import logging
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from client.home import Home
from client.policy.approval import pending, pending_head
from shared.errors import InputError
from shared.experiment.config import Experiment, load_experiment
from shared.experiment.recipes import find_experiment, recipe_names
from shared.messages.agreement.plan import resolve
from shared.messages.training import experiment_digest

LONGEST_NUMBER = 6
"""Digits; more are the beginning of a digest."""
log = logging.getLogger("maskfed.client")


@dataclass(frozen=True)
class Waiting:
    """One experiment that somebody has asked for."""

    number: int
    """Given when it was asked for, and never to another; 0: an older version kept it, it is named by its digest."""
    digest: str
    experiment: Experiment
    run: str
    """The run that asked first; empty for a file of an older version."""
    asked: str
    """When, in UTC."""


def waiting(home: Home) -> list[Waiting]:
    """All that wait, the oldest first. What is not the experiment of its file's name is left out and logged."""
    return list(_read(home))


def find_waiting(home: Home, name: str) -> Waiting | None:
    """The one that waits under this number, digest or beginning of a digest; None if there is none, or several."""
    is_number = name.isdecimal() and len(name) <= LONGEST_NUMBER
    found = [
        each
        for each in waiting(home)
        if (each.number and str(each.number) == name if is_number else name and each.digest.startswith(name))
    ]
    return found[0] if len(found) == 1 else None


def differences_to_recipe(experiment: Experiment) -> tuple[str, list[str]]:
    """The shipped recipe that differs in the fewest fields, and those fields as `section.key = here, there ...`."""
    compared = ((name, _differing(experiment, name)) for name in recipe_names())
    return min(compared, key=lambda each: len(each[1]))


def told(facts: Mapping[str, Any]) -> list[str]:
    """Facts of `in_words.waiting_facts` for people: what `approve list` and the live page show below the digest.

    What it costs comes first: of differences there may be so many that nobody reads on.
    """
    recipe, differing = facts["recipe"], facts["differences"]
    fields = f"{len(differing)} field{'s' if len(differing) > 1 else ''}"
    return [
        f"asked for by run {facts['run']!r} on {facts['asked']} UTC",
        *facts["in_words"][1:],
        f"recipe {recipe}, " + (f"but for {fields}:" if differing else "unchanged"),
        *(f"  {line}" for line in differing),
    ]


def _differing(experiment: Experiment, recipe: str) -> list[str]:
    ours, theirs = (_fields(each) for each in (experiment, resolve(load_experiment(find_experiment(recipe)))))
    return [f"{key} = {value!r}, there {theirs.get(key)!r}" for key, value in ours.items() if value != theirs.get(key)]


def _fields(experiment: Experiment) -> dict[str, Any]:
    tree = tomllib.loads(experiment.to_toml())
    return {f"{section}.{key}": value for section, fields in tree.items() for key, value in fields.items()}


def _read(home: Home) -> Iterator[Waiting]:
    for path in reversed(pending(home)):
        try:
            experiment = load_experiment(path)
        except InputError as error:
            log.warning("%s", error)
            continue
        if experiment_digest(experiment) != path.stem:
            log.warning("%s is not the experiment of its name: it was changed here; remove it", path)
            continue
        head = pending_head(path)
        yield Waiting(head.number, path.stem, experiment, head.run, head.asked)


def length_in_words(rounds: int, steps: int) -> str:
    """How long a plan is, such as `1 round of 2 steps`."""
    return f"{rounds} round{'s' if rounds != 1 else ''} of {steps} step{'s' if steps != 1 else ''}"
