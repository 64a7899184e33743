"""The second question of a round with masked updates: what removes the masks of their sum."""

from typing import Annotated, Literal, Self

from flwr.app import ArrayRecord, RecordDict
from pydantic import Field, model_validator

from shared.experiment.config import Section
from shared.messages.envelope import header_record, read_header, validated
from shared.messages.text import Line
from shared.messages.training import RefusalCode
from shared.secure_aggregation.dealing import Box
from shared.secure_aggregation.roster import MAX_SITES, MIN_SITES, Alias, Hex32
from shared.secure_aggregation.shamir import SHARE_BYTES

UNMASK_ACTION = "unmask"
"""Routes the message to its handler: the message type is `query.unmask`."""
Shares = Annotated[str, Field(pattern=r"^([0-9a-f]{66})+$", max_length=2 * SHARE_BYTES * MAX_SITES)]
"""Shares behind each other, hexadecimal."""


class UnmaskQuery(Section):
    """Whose updates are in the sum, and what those sites have sealed for the one that is asked."""

    schema_version: Literal[1] = 1
    run: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    server_round: int = Field(ge=1)
    request_digest: Hex32
    """Of the training request whose masked updates were added up."""
    survivors: tuple[Alias, ...] = Field(min_length=MIN_SITES, max_length=MAX_SITES)
    """By alias."""
    boxes: tuple[Box, ...] = Field(min_length=MIN_SITES, max_length=MAX_SITES)
    """Of each survivor."""

    @model_validator(mode="after")
    def _listed(self) -> Self:
        if list(self.survivors) != sorted(set(self.survivors)) or len(self.boxes) != len(self.survivors):
            raise ValueError("survivors are named once each, by alias, with a box each")
        return self


class UnmaskAnswer(Section):
    """What a site gives back. Every field is on the release list in client/README.md."""

    schema_version: Literal[1] = 1
    status: Literal["unmasked", "refused"]
    request_digest: Hex32
    shares: tuple[Shares, ...] = Field((), max_length=MAX_SITES)
    """For each survivor this site's shares of the seeds that the list of survivors leaves open."""
    refusal: RefusalCode | None = None
    reason: Line = ""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if (self.status == "unmasked") != bool(self.shares) or bool(self.shares) == bool(self.refusal):
            raise ValueError("shares, or a refusal with its code")
        return self

    def revealed(self, dealer: int) -> list[bytes]:
        """The shares of the survivor at `dealer` in the list."""
        text, digits = self.shares[dealer], 2 * SHARE_BYTES
        return [bytes.fromhex(text[start : start + digits]) for start in range(0, len(text), digits)]


def unmask_record(message: UnmaskQuery | UnmaskAnswer) -> RecordDict:
    """Question or answer as it travels."""
    return RecordDict({"arrays": ArrayRecord(), "header": header_record(message)})


def read_unmask_query(content: RecordDict) -> UnmaskQuery:
    """The question.

    Raises:
        MessageError: it does not follow the protocol.
    """
    return validated(UnmaskQuery, read_header(content))


def read_unmask_answer(content: RecordDict) -> UnmaskAnswer:
    """A site's answer.

    Raises:
        MessageError: it does not follow the protocol.
    """
    return validated(UnmaskAnswer, read_header(content))
