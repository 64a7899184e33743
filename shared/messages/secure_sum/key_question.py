"""The question at the start of a run: would you add up with these sites, and what is your key for it?"""

from typing import Literal, Self

from flwr.app import ArrayRecord, RecordDict
from pydantic import Field, model_validator

from shared.experiment.config import Section
from shared.messages.envelope import header_record, read_header, validated
from shared.messages.text import Line
from shared.messages.training import RefusalCode
from shared.secure_aggregation.roster import MAX_SITES, MIN_SITES, Member, Peer

KEYS_ACTION = "secure_keys"
"""Routes the message to its handler: the message type is `query.secure_keys`."""


class KeysQuery(Section):
    """Whom the coordinator wants to add up; the roster is made of those who answer."""

    schema_version: Literal[1] = 1
    run: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    peers: tuple[Peer, ...] = Field(min_length=MIN_SITES, max_length=MAX_SITES)


class KeysAnswer(Section):
    """What a site says. Every field is on the release list in client/README.md."""

    schema_version: Literal[1] = 1
    status: Literal["accepted", "refused"]
    member: Member | None = None
    """Its key for the run's secure sums, signed."""
    refusal: RefusalCode | None = None
    reason: Line = ""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if (self.status == "accepted") != (self.member is not None) or (self.member is None) != bool(self.refusal):
            raise ValueError("an acceptance has a key, a refusal has its code")
        return self


def keys_record(query: KeysQuery | KeysAnswer) -> RecordDict:
    """Question or answer as it travels."""
    return RecordDict({"arrays": ArrayRecord(), "header": header_record(query)})


def read_keys_query(content: RecordDict) -> KeysQuery:
    """The question.

    Raises:
        MessageError: it does not follow the protocol.
    """
    return validated(KeysQuery, read_header(content))


def read_keys_answer(content: RecordDict) -> KeysAnswer:
    """A site's answer.

    Raises:
        MessageError: it does not follow the protocol.
    """
    return validated(KeysAnswer, read_header(content))
