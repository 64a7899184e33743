"""An offer: a round's request without weights, and what a site would do and spend. Nothing is charged for either.

The question is the header of the request itself (`RequestHeader`), so that what is accepted is what will be asked. An
answer follows from the site's policy and from this coordinator's own requests; every figure in it is range-checked.
"""

from typing import Literal, Self

from flwr.app import ArrayRecord, RecordDict
from pydantic import Field, model_validator

from shared.experiment.config import Section
from shared.messages.envelope import header_record, read_header, validated
from shared.messages.packing import MessageError
from shared.messages.text import Epsilon, Line
from shared.messages.training import RefusalCode, RequestHeader

OFFER_ACTION = "offer"
"""Routes the message to its handler: the message type is `query.offer`."""
MOST_REASONS = 32


class Reason(Section):
    """One thing that the site's policy has against the plan."""

    code: RefusalCode
    text: Line
    """Fixed words and numbers of policy and request."""


class OfferAnswer(Section):
    """What a site says to an offer. Every field is on the release list in client/README.md."""

    schema_version: Literal[1] = 1
    status: Literal["accepted", "refused"]
    reasons: tuple[Reason, ...] = Field((), max_length=MOST_REASONS)
    """All that the policy refuses, at once; empty when the plan is accepted."""
    unit: Literal["image", "person"] | None = None
    """What the epsilons below protect; None without DP."""
    epsilon_mean_image: Epsilon | None = None
    """Of the plan's mean image alone, at `delta`; None where it has none, without DP, or where it was not computed."""
    epsilon_round: Epsilon | None = None
    """Of this plan alone, after its mean image and one round."""
    epsilon_run: Epsilon | None = None
    """Of this plan alone, after its mean image and all of its rounds."""
    delta: float | None = Field(None, gt=0, lt=1)
    epsilon_cap: Epsilon | None = None
    """The policy's, over all plans."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if (self.status == "refused") != bool(self.reasons):
            raise ValueError("a refused offer has its reasons, an accepted one has none")
        told = [each for each in (self.epsilon_mean_image, self.epsilon_round, self.epsilon_run) if each is not None]
        if told != sorted(told):
            raise ValueError("a plan does not cost less than its beginning")
        return self


def offer_record(header: RequestHeader) -> RecordDict:
    """The offer of a plan as it travels: the request's header, and no array."""
    return RecordDict({"arrays": ArrayRecord(), "header": header_record(header)})


def read_offer(content: RecordDict) -> RequestHeader:
    """The plan that is offered.

    Raises:
        MessageError: it does not follow the protocol, or brings arrays.
    """
    if any(content.array_records.get("arrays") or ()):
        raise MessageError("an offer with arrays: it is made before the first weight travels")
    return validated(RequestHeader, read_header(content))


def read_answer(content: RecordDict) -> OfferAnswer:
    """A site's answer.

    Raises:
        MessageError: it does not follow the protocol.
    """
    return validated(OfferAnswer, read_header(content))
