"""What a coordinator asks of a site's feature statistics, and how a site answers: headers of the messages. No flwr."""

from typing import Literal

from pydantic import Field

from shared.evaluation.feature_statistics import FeatureSpace
from shared.experiment.config import Section
from shared.messages.envelope import parse_header, validated
from shared.messages.text import Epsilon, Line

MAX_FILE_BYTES = 300 * 2**20


class StatisticsQuery(Section):
    """One question to all sites; for a private release the projection file comes with it."""

    schema_version: Literal[1] = 1
    run: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    kind: Literal["exact", "dp"]
    extractor: str = Field(max_length=200)
    layer: str = Field(max_length=40)
    extractor_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    noise_multiplier: float = Field(0.0, ge=0)

    @property
    def space(self) -> FeatureSpace:
        """The feature space that is asked for."""
        return FeatureSpace(self.extractor, self.layer, self.extractor_sha256)


class StatisticsAnswer(Section):
    """A site's answer; the statistics file comes with it unless it was refused."""

    schema_version: Literal[1] = 1
    status: Literal["released", "refused"]
    reason: Line = ""
    """Of a refusal; fixed text and policy numbers, nothing computed from images."""


class ReleasedFacts(Section):
    """What a statistics file of a site says about itself; the sums stand beside it."""

    site: str
    release: Literal["exact", "dp"]
    n: float = Field(gt=0, allow_inf_nan=False)
    """Images; with noise in a private release."""
    epsilon: Epsilon | None = None
    delta: float | None = Field(None, gt=0, lt=1)
    source: Line = ""
    images: dict[Line, Line] = Field(default_factory=dict, max_length=16)


def parse_query(text: str) -> StatisticsQuery:
    """Read a question.

    Raises:
        MessageError: it does not follow the protocol.
    """
    return validated(StatisticsQuery, parse_header(text))
