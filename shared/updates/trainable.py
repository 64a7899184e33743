"""Which tensors a stage trains: shell patterns over tensor names; and which of them are matrices inside the network.

No torch: the coordinator decides by names alone.
"""

import fnmatch
import re
from collections.abc import Iterable, Sequence

from shared.errors import InputError

_PATTERNS = {"attention": "*attention*"}
_BLOCKS = re.compile(r"(in_blocks|mid_block|out_blocks)\.")


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


def is_hidden_matrix(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor is a matrix of one of the U-ViT's blocks: what Muon trains.

    Norms and biases are no matrices; embedding, positions and output lie outside of the blocks.
    """
    return len(shape) == 2 and _BLOCKS.match(name) is not None
