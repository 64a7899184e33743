"""Seeded streams: every random number of a run has a name, so nothing depends on what was drawn before it."""

import hashlib
import hmac
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SEED_BITS = 63
WORDS, WORDS_AT = 624, 24
"""The Mersenne Twister's state: so many words of 32 bits, each in 8 bytes of torch's state, from this byte on."""


def derive_key(root: int | bytes, *names: str | int) -> bytes:
    """Key of the stream `names` under `root`, 32 bytes, the same in every process and on every machine.

    Names are hashed with their type and length, so ("a", "bc") and ("ab", "c") or 1 and "1" are different streams.

    Args:
        root: an int is public (SHA-256); bytes are a secret (HMAC-SHA256), and the keys do not reveal it.
        names: path of the stream, for example ("noise", step, rank, micro_batch).
    """
    path = b"".join(_encode(name) for name in names)
    if isinstance(root, bytes):
        return hmac.new(root, path, hashlib.sha256).digest()
    return hashlib.sha256(_encode(root) + path).digest()


def derive_seed(root: int | bytes, *names: str | int) -> int:
    """First bits of `derive_key` as an integer in [0, 2^63), for generators that use all bits of such a seed."""
    return int.from_bytes(derive_key(root, *names)[:8], "big") >> (64 - SEED_BITS)


def generator(seed: int | bytes, device: "str | torch.device" = "cpu") -> "torch.Generator":
    """A new generator on `device`, of which every bit of `seed` decides the numbers.

    torch's CPU generator keeps 32 bits of a seed, so its whole state is set, from SHAKE-256 of the seed. On a GPU the
    key of torch's Philox has 64 bits, all of them of the hash.
    """
    import numpy as np
    import torch

    stream = hashlib.shake_256(seed if isinstance(seed, bytes) else _encode(seed)).digest(8 + 4 * WORDS)
    new = torch.Generator(device=device).manual_seed(int.from_bytes(stream[:8], "big"))
    if new.device.type == "cpu":
        state = new.get_state()
        words = torch.from_numpy(np.frombuffer(stream[8:], "<u4").astype("<u8").view(np.uint8))
        state[WORDS_AT : WORDS_AT + 8 * WORDS] = words
        new.set_state(state)
    return new


@dataclass(frozen=True, repr=False)
class Streams:
    """All streams below one root and prefix; handing on `child` hands on a branch, not the root's other branches.

    Attributes:
        root: public int or secret bytes, as in `derive_key`.
        prefix: names put before every stream's own.
    """

    root: int | bytes
    prefix: tuple[str | int, ...] = ()

    def seed(self, *names: str | int) -> int:
        """Seed in [0, 2^63) of the stream `names` below the prefix."""
        return derive_seed(self.root, *self.prefix, *names)

    def key(self, *names: str | int) -> bytes:
        """Key of the stream `names` below the prefix, 32 bytes."""
        return derive_key(self.root, *self.prefix, *names)

    def generator(self, *names: str | int, device: "str | torch.device" = "cpu") -> "torch.Generator":
        """A new generator on `device` at the start of the stream `names`, from all 256 bits of its key."""
        return generator(self.key(*names), device)

    def child(self, *names: str | int) -> "Streams":
        """The branch below `names`."""
        return Streams(self.root, (*self.prefix, *names))


def _encode(name: str | int) -> bytes:
    kind = b"i" if isinstance(name, int) else b"s"
    text = str(int(name) if isinstance(name, int) else name).encode()
    return kind + len(text).to_bytes(8, "big") + text
