"""A projection so small that clipping and noise vanish in float64: exact sums under a charged, tiny epsilon.

The coordinator knows every image of the site but one, asks for private statistics through its own projection
(columns of 1e-170, radius 1e-300) and guesses from the sum whether the chosen image is there.
"""

from collections.abc import Callable
from contextlib import ExitStack
from unittest import mock

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from safetensors.numpy import save

from benchmarks.privacy_attacks.outcome import Outcome
from benchmarks.privacy_attacks.question_site import fresh_copy, make_site, spent
from benchmarks.privacy_attacks.tiny_sites import new_machine
from benchmarks.scratch import scratch
from client.answers.statistics.statistics_request import answer_query
from client.home import Home
from client.limits import Ranges
from client.settings import SitePolicy
from shared.data.synthetic import generate
from shared.evaluation import private_statistics as mechanism
from shared.evaluation.extractor import Extractor
from shared.evaluation.feature_statistics import load_statistics
from shared.evaluation.networks import load_extractor
from shared.messages.statistics import StatisticsQuery

NAME, OTHERS, SIDE = "statistics: hostile projection", 24, 16
SCALE, RADIUS, NOISE = 1e-3, 1e-9, 1000.0
POLICY = SitePolicy(
    tasks=("statistics",), experiments="any", epsilon_cap=1.0, min_noise_multiplier=1.0, min_images_statistics=2,
    extractors=("random-inception",),
)  # fmt: skip


def attack(trials: int, is_guarded: bool, seed: int) -> Outcome:  # the signature of all attacks
    """Guess in each trial, on a site of its own, whether the chosen image is among the site's."""
    rng, extractor = np.random.default_rng(seed), load_extractor("random-inception")
    images, _ = generate(OTHERS + 1, SIDE, seed, site="site0", images_per_person=1)
    features = np.asarray(extractor(torch.from_numpy(images)), np.float64)
    sums = [features[:OTHERS].sum(0), features.sum(0)]
    correct, epsilon = 0, 0.0
    with new_machine() as root, ExitStack() as off:
        sites = [make_site(root / str(more), images[: OTHERS + more], POLICY) for more in (0, 1)]
        if not is_guarded:
            lift_guards(off)
        for trial in range(trials):
            is_in = int(rng.integers(2))
            home = fresh_copy(sites[is_in], root / f"trial{trial}")
            found = ask(home, extractor)
            guess = int(rng.integers(2)) if found is None else nearest(found, sums)
            correct += guess == is_in
            epsilon = max(epsilon, spent(home))
    return Outcome(NAME, trials, correct, epsilon)


def lift_guards(off: ExitStack) -> None:
    """The mechanism without its checks and without the clipping that does not look at the radius."""

    def unclipped(projection: mechanism.Projection, features: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        return (np.asarray(features, np.float64) - projection.mean_D) @ projection.basis_DP / projection.radius

    off.enter_context(mock.patch.object(mechanism, "check_projection", lambda _: None))
    off.enter_context(mock.patch("client.answers.statistics.site_statistics.check_projection", lambda _: None))
    off.enter_context(mock.patch.object(Ranges, "outside", lambda *_: ""))
    off.enter_context(mock.patch.object(mechanism.Projection, "unit_ball", unclipped))


def ask(home: Home, extractor: Extractor) -> np.ndarray | None:  # type: ignore[type-arg]
    """The sum of features that the site's statistics give away; None where it refuses."""
    space = extractor.space
    query = StatisticsQuery(
        run="ask", kind="dp", extractor=space.extractor, layer=space.layer, extractor_sha256=space.sha256,
        noise_multiplier=NOISE,
    )  # fmt: skip
    tensors = {
        "mean": np.zeros(extractor.width),
        "basis": SCALE * np.eye(extractor.width),
        "radius": np.array([RADIUS]),
    }
    facts = {"extractor": space.extractor, "layer": space.layer, "extractor_sha256": space.sha256, "schema": "1"}
    file = Array(np.frombuffer(save(tensors, facts), np.uint8))
    header = ConfigRecord({"json": query.model_dump_json()})
    answer = answer_query(RecordDict({"arrays": ArrayRecord({"file": file}), "header": header}), home)
    if "file" not in answer.array_records["arrays"]:
        return None
    with scratch() as folder:
        path = folder / "released.safetensors"
        path.write_bytes(answer.array_records["arrays"]["file"].numpy().tobytes())
        total: np.ndarray = load_statistics(path).total_D / SCALE  # type: ignore[type-arg]
    return total


def nearest(found: np.ndarray, sums: list[np.ndarray]) -> int:  # type: ignore[type-arg]
    """Which of the sums is nearer."""
    return int(np.argmin([np.linalg.norm(found - each) for each in sums]))


ATTACKS: dict[str, Callable[[int, bool, int], Outcome]] = {NAME: attack}
