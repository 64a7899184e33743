"""Which tensors a stage trains: shell patterns over tensor names. No torch: the coordinator decides by names alone."""

import fnmatch
from collections.abc import Iterable

from shared.errors import InputError

_PATTERNS = {"attention": "*attention*"}


def select_trainable(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """Sorted names that match any pattern (case-sensitive, `*` crosses dots); `attention` means `*attention*`.

    Raises:
        InputError: a pattern matches no tensor, which is a typing error more often than a wish.
    """
    everything, chosen = list(names), set()
    known = {name for name in everything if not set("*?[") & set(name)} - _PATTERNS.keys()
    for pattern in patterns:
        # A name is no pattern to compile: a round's request names each of its tensors.
        found = [pattern] if pattern in known else fnmatch.filter(everything, _PATTERNS.get(pattern, pattern))
        if not found:
            raise InputError(
                f"federation.trainable {pattern!r} matches none of {len(everything)} tensors such as {everything[:2]}"
            )
        chosen.update(found)
    return sorted(chosen)
