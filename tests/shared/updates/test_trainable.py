"""Patterns of tensors: names are names, whatever else is a shell pattern, and what matches nothing is an error."""

import pytest

from shared.errors import InputError
from shared.updates.trainable import select_trainable

NAMES = ["blocks.0.attention.weight", "blocks.0.mlp.weight", "attention", "odd[0]", "odd0", "Head"]


@pytest.mark.parametrize(
    ("patterns", "found"),
    [
        (["Head", "blocks.0.mlp.weight"], ["Head", "blocks.0.mlp.weight"]),
        (["attention"], ["attention", "blocks.0.attention.weight"]),
        (["blocks.*"], ["blocks.0.attention.weight", "blocks.0.mlp.weight"]),
        (["odd[0]"], ["odd0"]),
        (["Head", "*"], sorted(NAMES)),
    ],
)
def test_each_pattern_gives_what_it_matches_once(patterns: list[str], found: list[str]):
    assert select_trainable(NAMES, patterns) == found


@pytest.mark.parametrize("pattern", ["head", "Hea", "blocks.1.*", ""])
def test_a_pattern_that_matches_nothing_is_refused(pattern: str):
    with pytest.raises(InputError, match="matches none of 6 tensors"):
        select_trainable(NAMES, ["Head", pattern])
