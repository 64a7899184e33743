"""Seeded streams: every random number of a run has a name, so nothing depends on what was drawn before it."""

import hashlib
import hmac
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SEED_BITS = 63


def derive_seed(root: int | bytes, *names: str | int) -> int:
    """Seed of the stream `names` under `root`.

    Names are hashed with their type and length, so ("a", "bc") and ("ab", "c") or 1 and "1" are different streams.

    Args:
        root: an int is public (SHA-256); bytes are a secret (HMAC-SHA256), and the seeds do not reveal it.
        names: path of the stream, for example ("noise", step, rank, micro_batch).

    Returns:
        An integer in [0, 2^63), the same in every process and on every machine.
    """
    path = b"".join(_encode(name) for name in names)
    if isinstance(root, bytes):
        digest = hmac.new(root, path, hashlib.sha256).digest()
    else:
        digest = hashlib.sha256(_encode(root) + path).digest()
    return int.from_bytes(digest[:8], "big") >> (64 - SEED_BITS)


def generator(seed: int, device: "str | torch.device" = "cpu") -> "torch.Generator":
    """A new generator on `device`, seeded with `seed` in [0, 2^63)."""
    import torch

    return torch.Generator(device=device).manual_seed(seed)


@dataclass(frozen=True, repr=False)
class Streams:
    """All streams below one root and prefix; handing on `child` hands on a branch, not the root's other branches.

    Attributes:
        root: public int or secret bytes, as in `derive_seed`.
        prefix: names put before every stream's own.
    """

    root: int | bytes
    prefix: tuple[str | int, ...] = ()

    def seed(self, *names: str | int) -> int:
        """Seed in [0, 2^63) of the stream `names` below the prefix."""
        return derive_seed(self.root, *self.prefix, *names)

    def generator(self, *names: str | int, device: "str | torch.device" = "cpu") -> "torch.Generator":
        """A new generator on `device` at the start of the stream `names`."""
        return generator(self.seed(*names), device)

    def child(self, *names: str | int) -> "Streams":
        """The branch below `names`."""
        return Streams(self.root, (*self.prefix, *names))


def _encode(name: str | int) -> bytes:
    kind = b"i" if isinstance(name, int) else b"s"
    text = str(int(name) if isinstance(name, int) else name).encode()
    return kind + len(text).to_bytes(8, "big") + text
