"""Sites of a secure sum for tests: keys, a roster, and what each of them would send."""

from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from shared.secure_aggregation.roster import Member, Roster, sign_key, threshold_for
from shared.secure_aggregation.round_keys import RoundKeys, public_text
from tests.signing import key_of, public_of

RUN, DIGEST = "run", "5d" * 32


@dataclass(frozen=True)
class Parties:
    """All sites of one roster with their private keys."""

    keys: dict[str, X25519PrivateKey]
    roster: Roster

    def of(self, alias: str, digest: str = DIGEST) -> RoundKeys:
        return RoundKeys(self.keys[alias], self.roster, alias, digest)

    def all(self, digest: str = DIGEST) -> list[RoundKeys]:
        return [self.of(alias, digest) for alias in self.roster.aliases]


def member(alias: str, key: X25519PrivateKey, run: str = RUN) -> Member:
    public = public_text(key)
    signature = sign_key(key_of(alias), run, alias, public)
    return Member(alias=alias, signing_key=public_of(alias), public_key=public, signature=signature)


def parties(count: int = 5, num_colluding: int = 0) -> Parties:
    keys = {f"site-{number:02d}": X25519PrivateKey.generate() for number in range(count)}
    members = tuple(member(alias, key) for alias, key in keys.items())
    return Parties(keys, Roster(members=members, threshold=threshold_for(count, num_colluding)))
