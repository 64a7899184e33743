"""The mean image of each site: ask all that are online, check what comes, keep one file a site. No torch.

`ask_mean_images` runs in the operator's command; `gather_mean_images` runs in the ServerApp of the question's run.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, Message, MessageType, RecordDict
from numpy.typing import NDArray
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from server.federation.fleet.registry import check_home
from server.federation.messaging.question import collect, reasons, submit
from server.federation.messaging.transport import Grid, Timing
from server.planning.epsilon_forecast import Steps
from server.planning.epsilon_forecast import epsilon as planned_epsilon
from server.runs.lineage import MeanImageCharge
from server.runs.run_directory import RunDir, create
from shared.errors import InputError
from shared.experiment.config import Experiment, Section
from shared.messages.envelope import header_record, read_array, read_header, validated
from shared.messages.packing import MessageError
from shared.messages.statistics import COUNT_SHARE, MEAN_IMAGE_ACTION, PIXEL_SUM, MeanImageAnswer, MeanImageQuery
from shared.messages.text import Epsilon
from shared.storage.files import write_atomically
from shared.storage.runlog import RunLog

MEAN_IMAGE_FILE, SITES_FOLDER = "mean_image.json", "sites"
DEADLINE_SECONDS = 3600.0
LEAST_COUNT = 4.0
"""Deviations of a count's noise that the count must have: below, the mean is mostly noise."""
LARGEST_NOISE = 6.0
"""Deviations of its noise that a mean pixel may lie outside of -1 to 1."""


class _Asked(Section):
    """The file that tells the ServerApp what to ask."""

    query: MeanImageQuery
    deadline_seconds: float


class _Facts(Section):
    """What a file of a mean image says beside its pixels."""

    site: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    deviation: float = Field(gt=0, allow_inf_nan=False)
    """Of the noise of each pixel."""
    num_units: float
    epsilon: Epsilon | None = None


@dataclass(frozen=True)
class MeanImage:
    """What a site has released."""

    site: str
    pixels: NDArray[np.float64]
    """(3, S, S) on the scale from -1 to 1, with noise."""
    deviation: float
    """Of the noise of each value."""


def ask_mean_images(
    home: Path,
    experiment: Experiment,
    say: Callable[[str], None] = lambda _: None,
    poll_seconds: float = 1.0,
    deadline_seconds: float = DEADLINE_SECONDS,
) -> Path:
    """Ask every site that is online for its mean image; each answer is charged to that site's budget.

    Args:
        home: the coordinator's folder, with a running SuperLink.
        experiment: its section `privacy` says noise and unit; sites approve it as for rounds.
        say: told who answered and who refused, and why.
        poll_seconds: between two looks at the run.
        deadline_seconds: for the answers.

    Returns:
        The question's run, whose mean images `load_mean_images` reads as often as needed.

    Raises:
        InputError: an experiment without mean image, or nobody released one, and why.
        ControlError: the SuperLink cannot be reached, or the question did not end in time.
    """
    check_home(home)
    if not experiment.privacy.mean_image_noise:
        raise InputError("privacy.mean_image_noise is 0, so the experiment has no mean image: give it, e.g. 3.7")
    query = MeanImageQuery(run=f"align-{datetime.now(UTC):%Y%m%d-%H%M%S}", experiment=experiment)
    run = create(home / "runs" / query.run, experiment)
    asked = _Asked(query=query, deadline_seconds=deadline_seconds)
    write_atomically(run.path / MEAN_IMAGE_FILE, asked.model_dump_json(indent=2) + "\n")
    outcomes = submit(
        home, experiment, query.run, "mean_image", say, poll_seconds=poll_seconds, deadline_seconds=deadline_seconds
    )
    if not list((run.path / SITES_FOLDER).glob("*.safetensors")):
        raise InputError(f"no site released a mean image: {reasons(outcomes)}")
    return run.path


def gather_mean_images(grid: Grid, home: Path, folder: Path, timing: Timing | None = None) -> None:
    """Ask, and write what comes: `sites/<alias>.safetensors`, and one line per site in the run log.

    Raises:
        ExchangeError: the SuperLink does not answer, or does not take the question.
    """
    asked = _Asked.model_validate_json((folder / MEAN_IMAGE_FILE).read_text(encoding="utf-8"))
    collect(
        grid,
        home,
        RecordDict({"arrays": ArrayRecord(), "header": header_record(asked.query)}),
        f"{MessageType.QUERY}.{MEAN_IMAGE_ACTION}",
        lambda message, alias: _take(message, asked.query, alias, folder / SITES_FOLDER),
        RunLog(folder / "metrics.jsonl"),
        "mean_image",
        timing=timing,
        deadline_seconds=asked.deadline_seconds,
        reply_bytes=4 * _num_pixels(asked.query) + 1024,
    )


def mean_of(sum_D: NDArray[np.float32], num_units: float, norm: float, noise: float, site: str) -> MeanImage:  # noqa: N803
    """The mean image in a noisy sum of pixels.

    Args:
        sum_D: (3 S S,), of units whose root mean square is at most `norm`.
        num_units: in the sum, with noise.
        norm: the site's.
        noise: multiplier sigma; 0 for a sum without.
        site: alias.
    """
    size = math.isqrt(len(sum_D) // 3)
    pixels = (sum_D.astype(np.float64) / num_units).reshape(3, size, size)
    length = norm * math.sqrt(pixels.size)
    return MeanImage(site, pixels, noise * length / math.sqrt(1 - COUNT_SHARE**2) / num_units)


def load_mean_images(run: Path) -> list[MeanImage]:
    """The mean images of a question's run, by alias.

    Raises:
        InputError: there are none, or a file is damaged.
    """
    files = sorted((run / SITES_FOLDER).glob("*.safetensors"))
    if not files:
        raise InputError(f"{run} holds no mean images: name a run that `maskfed-server align` has made")
    return [_load(file) for file in files]


def charge_of(run: Path) -> MeanImageCharge:
    """What a question's run cost each site that answered.

    Raises:
        InputError: `run` holds no mean images.
    """
    privacy = RunDir(run).experiment.privacy
    noise = privacy.mean_image_noise
    return MeanImageCharge(
        run=run.resolve().name,
        num_sites=len(load_mean_images(run)),
        unit=privacy.unit,
        noise_multiplier=noise,
        delta=privacy.delta,
        epsilon=planned_epsilon([Steps(noise, 1.0, 1)], privacy.delta),
    )


def _take(message: Message, query: MeanImageQuery, alias: str, folder: Path) -> tuple[str, str]:
    """Check an answer and keep its mean image; its outcome and reason.

    Raises:
        InputError: the answer does not follow the protocol, or holds no image.
    """
    answer = validated(MeanImageAnswer, read_header(message.content))
    if answer.status == "refused":
        return "refused", f"{answer.refusal}: {answer.reason}"
    privacy, federation = query.experiment.privacy, query.experiment.federation
    if answer.request_digest != query.digest or answer.unit != privacy.unit:
        raise MessageError("an answer to another question, or in another unit, than was asked")
    least = LEAST_COUNT * privacy.mean_image_noise / COUNT_SHARE
    if not least <= answer.num_units <= federation.max_examples + least:
        raise InputError(
            f"{answer.num_units:.0f} units after noise, of use are {least:.0f} to federation.max_examples "
            f"{federation.max_examples}: give less noise, or raise the latter"
        )
    sum_D = read_array(message.content, PIXEL_SUM, _num_pixels(query))  # noqa: N806
    if sum_D.dtype != np.float32 or not np.isfinite(sum_D).all():
        raise MessageError("a pixel sum that is not of finite float32 numbers")
    mean = mean_of(sum_D, answer.num_units, answer.norm, privacy.mean_image_noise, alias)
    if np.abs(mean.pixels).max() > 1 + LARGEST_NOISE * mean.deviation:
        raise MessageError("a pixel sum that no images have")
    facts = _Facts(site=alias, deviation=mean.deviation, num_units=answer.num_units, epsilon=answer.epsilon)
    folder.mkdir(exist_ok=True)
    write_atomically(folder / f"{alias}.safetensors", save({"mean": mean.pixels}, {"facts": facts.model_dump_json()}))
    return "released", "" if answer.epsilon is None else f"epsilon {answer.epsilon:.2f} per {answer.unit} in all"


def _load(file: Path) -> MeanImage:
    try:
        with safe_open(file, framework="numpy") as opened:
            facts = _Facts.model_validate_json((opened.metadata() or {})["facts"])
            pixels = opened.get_tensor("mean")
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise InputError(f"{file} is damaged: restore it from a copy, or ask again ({type(error).__name__})") from error
    if pixels.ndim != 3 or not np.isfinite(pixels).all():
        raise InputError(f"{file} is damaged: restore it from a copy, or ask again (no image)")
    return MeanImage(facts.site, pixels.astype(np.float64), facts.deviation)


def _num_pixels(query: MeanImageQuery) -> int:
    return 3 * query.experiment.model.image_size**2
