"""The roster of a run: who is in its sums, with a key for each site that the site itself has signed.

A coordinator that could invent sites would fill a sum with its own and read the one update among them. So each key for
secure sums is signed with the signing key that the site's messages carry, and sites take up rosters of such keys only
as their operators know.
"""

import hashlib
import json
from typing import Annotated, Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import Field, model_validator

from shared.errors import InputError
from shared.experiment.config import Section

MIN_SITES, MAX_SITES = 3, 64
"""In a sum of two each site could take its own update away; shares grow with the square of the sites."""
Hex32 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Alias = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,31}$")]


class SecureSumError(InputError):
    """What the other side says of a secure sum does not hold; the text is fixed words, aliases and numbers."""


class Peer(Section):
    """A site by name and signing key, as operators compare it."""

    alias: Alias
    signing_key: Hex32
    """Ed25519, public."""

    @property
    def digest(self) -> str:
        """What an operator approves: this name with this key."""
        return hashlib.sha256(json.dumps(["maskfed peer 1", self.alias, self.signing_key]).encode()).hexdigest()


class Member(Peer):
    """A site of a roster."""

    public_key: Hex32
    """X25519, of this run only."""
    signature: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]
    """Of the site's signing key over run, name and key."""

    def check(self, run: str) -> None:
        """Refuse a key that the site has not signed for this run.

        Raises:
            SecureSumError: names the site.
        """
        try:
            key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(self.signing_key))
            key.verify(bytes.fromhex(self.signature), _statement(run, self.alias, self.public_key))
        except (InvalidSignature, ValueError) as error:
            raise SecureSumError(
                f"the key of site {self.alias} in the roster is not signed by it for this run"
            ) from error


class Roster(Section):
    """The sites of a run's sums, by alias, and how many of them have to answer so that a sum can be read."""

    members: tuple[Member, ...] = Field(min_length=MIN_SITES, max_length=MAX_SITES)
    threshold: int = Field(ge=2, le=MAX_SITES)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        aliases = [member.alias for member in self.members]
        keys = {key for member in self.members for key in (member.signing_key, member.public_key)}
        if aliases != sorted(set(aliases)) or len(keys) < 2 * len(aliases):
            raise ValueError("a roster names each site and each key once, by alias")
        if not len(aliases) < 2 * self.threshold <= 2 * len(aliases):
            raise ValueError(f"threshold {self.threshold} of {len(aliases)} sites: more than half are needed")
        return self

    @property
    def aliases(self) -> tuple[str, ...]:
        """In the order that numbers shares and gives masks their signs."""
        return tuple(member.alias for member in self.members)

    @property
    def identity(self) -> str:
        """SHA-256 of who is in it, by name and signing key; the keys of one run are not."""
        return hashlib.sha256(json.dumps([member.digest for member in self.members]).encode()).hexdigest()

    def number_of(self, alias: str) -> int:
        """Place of a site, from 0.

        Raises:
            SecureSumError: a stranger.
        """
        if alias not in self.aliases:
            raise SecureSumError(f"site {alias} is not in the roster")
        return self.aliases.index(alias)


def threshold_for(num_sites: int, num_colluding: int) -> int:
    """Answers that reading a sum takes, t = floor((n + c) / 2) + 1.

    A coordinator that tells one part of the sites one list of survivors and the others another one, while c sites
    answer both, has enough answers to both only if 2 t <= n + c.

    Args:
        num_sites: n.
        num_colluding: c, sites that may work together with the coordinator.
    """
    return (num_sites + num_colluding) // 2 + 1


def sign_key(signing_key: Ed25519PrivateKey, run: str, alias: str, public_key: str) -> str:
    """A site's signature on its key for the secure sums of `run`, hexadecimal."""
    return signing_key.sign(_statement(run, alias, public_key)).hex()


def _statement(run: str, alias: str, public_key: str) -> bytes:
    return json.dumps(["maskfed secure sum key 1", run, alias, public_key]).encode()
