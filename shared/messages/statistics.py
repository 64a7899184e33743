"""What a coordinator asks of a site's statistics, and how a site answers: headers of the messages. No flwr.

Two kinds: feature statistics for distances, and one mean image, which public images are then made similar to.
"""

import hashlib
from typing import Literal, Self

from pydantic import Field, model_validator

from shared.evaluation.feature_statistics import FeatureSpace
from shared.experiment.config import Experiment, Section
from shared.messages.envelope import parse_header, validated
from shared.messages.text import Epsilon, Line
from shared.messages.training import RefusalCode
from shared.secure_aggregation.dealing import Dealing
from shared.secure_aggregation.roster import Roster
from shared.storage.files import canonical_json

MEAN_IMAGE_ACTION = "mean_image"
"""Routes the message to its handler: the message type is `query.mean_image`."""
PIXEL_SUM = "pixel_sum"
"""The array of the answer, float32 (3 S S,): the noisy sum of all units' pixels on the scale from -1 to 1."""
MAX_FILE_BYTES = 300 * 2**20

COUNT_SHARE = 0.25
"""b: what counts a unit in the sum, beside pixels of length sqrt(1 - b^2); the sensitivity of both together is 1.

At n units the count's relative error is sigma / (b n), and the noise of the pixels is 3 percent more than without it.
"""


class StatisticsQuery(Section):
    """One question to all sites; for a private release the projection file comes with it."""

    schema_version: Literal[1] = 1
    run: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    kind: Literal["exact", "dp"]
    extractor: str = Field(max_length=200)
    layer: str = Field(max_length=40)
    extractor_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    noise_multiplier: float = Field(0.0, ge=0)
    roster: Roster | None = None
    """With whom the answer is added up, masked; None: each site's own is wanted."""

    @property
    def space(self) -> FeatureSpace:
        """The feature space that is asked for."""
        return FeatureSpace(self.extractor, self.layer, self.extractor_sha256)


class StatisticsAnswer(Section):
    """A site's answer; the statistics file, or the masked numbers, come with it unless it was refused."""

    schema_version: Literal[1] = 1
    status: Literal["released", "refused"]
    reason: Line = ""
    """Of a refusal; fixed text and policy numbers, nothing computed from images."""
    dealing: Dealing | None = None
    """Sealed shares of the masks, with a masked answer; a file says the rest of one that is not."""
    epsilon: Epsilon | None = None
    """With a masked private answer: of all that was charged to the site's ledger, this answer included."""
    delta: float | None = Field(None, gt=0, lt=1)


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


class MeanImageQuery(Section):
    """One question to all sites for the mean image of an experiment: constants are in its section `privacy`."""

    schema_version: Literal[1] = 1
    run: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    experiment: Experiment

    @property
    def digest(self) -> str:
        """SHA-256 of the question: the same one again is answered as before."""
        return hashlib.sha256(canonical_json(self.model_dump(mode="json"))).hexdigest()


class MeanImageAnswer(Section):
    """A site's answer; the array `pixel_sum` comes with it unless it was refused."""

    schema_version: Literal[1] = 1
    request_digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    status: Literal["released", "refused"]
    refusal: RefusalCode | None = None
    reason: Line = ""
    num_units: float = Field(0.0, ge=-1e9, le=1e9, allow_inf_nan=False)
    """Images or persons, with noise."""
    norm: float = Field(1.0, gt=0, le=1)
    """The site's clipping norm: a unit's root mean square."""
    epsilon: Epsilon | None = None
    """Of all that was charged to the site's ledger, this answer included; None where no bound exists."""
    delta: float | None = Field(None, gt=0, lt=1)
    is_unbounded: bool = False
    epsilon_cap: Epsilon | None = None
    unit: Literal["image", "person"] | None = None

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if (self.status == "refused") != (self.refusal is not None):
            raise ValueError("a refusal carries its code, and nothing else does")
        return self
