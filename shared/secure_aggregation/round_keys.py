"""The secrets of one site in one round: what it shares with each other site, bound to this very request.

The X25519 key of a run is never shared and never leaves. Seeds and keys derive from its agreements and from the
request's digest, which covers run, round, roster, experiment and weights; what is revealed of one round is worth
nothing in another.
"""

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from shared.secure_aggregation.roster import Roster, SecureSumError

NONCE_BYTES, TAG_BYTES = 12, 16


def public_text(key: X25519PrivateKey) -> str:
    """The public half, hexadecimal."""
    return key.public_key().public_bytes_raw().hex()


class RoundKeys:
    """One site's secrets towards the others of its roster, for one request."""

    def __init__(self, key: X25519PrivateKey, roster: Roster, alias: str, request_digest: str) -> None:
        self.roster, self.number, self._alias, self._digest = roster, roster.number_of(alias), alias, request_digest
        self._key = key
        self._agreed: dict[int, bytes] = {}

    def pair_seed(self, other: int) -> bytes:
        """The seed (32 bytes) of the mask between this site and the one at `other`; both derive the same.

        Raises:
            SecureSumError: the other's key agrees on nothing.
        """
        first, second = sorted((self.number, other))
        return self._derive(other, "pair", first, second)

    def seal(self, receiver: int, nonce: bytes, text: bytes) -> bytes:
        """`text` for the site at `receiver` alone, which then knows that it is this site's for this request."""
        box = ChaCha20Poly1305(self._derive(receiver, "box", self.number, receiver))
        return nonce + box.encrypt(nonce, text, self._digest.encode())

    def open(self, dealer: int, sealed: bytes) -> bytes:
        """What the site at `dealer` has sealed for this one.

        Raises:
            SecureSumError: another's, another request's, or changed.
        """
        box = ChaCha20Poly1305(self._derive(dealer, "box", dealer, self.number))
        try:
            return box.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], self._digest.encode())
        except (InvalidTag, ValueError) as error:
            name = self.roster.aliases[dealer]
            raise SecureSumError(f"the shares of site {name} are not those that it dealt to this site") from error

    def _derive(self, other: int, purpose: str, first: int, second: int) -> bytes:
        info = f"maskfed secure sum 1 {purpose} {self._digest} {first} {second}".encode()
        return HKDF(hashes.SHA256(), 32, None, info).derive(self._agreement(other))

    def _agreement(self, other: int) -> bytes:
        if other not in self._agreed:
            member = self.roster.members[other]
            try:
                theirs = X25519PublicKey.from_public_bytes(bytes.fromhex(member.public_key))
                self._agreed[other] = self._key.exchange(theirs)
            except ValueError as error:
                raise SecureSumError(f"the key of site {member.alias} in the roster is none") from error
        return self._agreed[other]
