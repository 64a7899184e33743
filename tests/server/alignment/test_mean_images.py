"""Mean images asked of real site handlers, and of sites that answer as they like."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, RecordDict

from client.answers.statistics.mean_image import answer_mean_image
from client.data.dataset import scan
from client.home import Home
from client.settings import SiteConfig, SitePolicy, save_settings, write_private
from server.alignment.mean_images import LARGEST_NOISE, LEAST_COUNT, ask_mean_images, load_mean_images, mean_of
from server.app import conduct
from server.federation.fleet.registry import Registry
from server.federation.messaging.transport import Timing
from shared.data.image_cache import open_images
from shared.data.synthetic import write_folder
from shared.errors import InputError
from shared.experiment.config import Experiment
from shared.messages.envelope import header_record, read_header, validated
from shared.messages.statistics import COUNT_SHARE, PIXEL_SUM, MeanImageAnswer, MeanImageQuery
from shared.storage.runlog import read_metrics
from tests import signing
from tests.server.fake_grid import FakeGrid, Site

SIZE, D = 16, 3 * 16 * 16
PRIVACY = {"mechanism": "dp-sgd", "unit": "person", "mean_image_noise": 0.5}
EXPERIMENT = Experiment.model_validate({"model": {"image_size": SIZE, "patch_size": 8}, "privacy": PRIVACY})
Handler = Callable[[RecordDict, int], RecordDict]


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faces") / "faces"
    write_folder(folder, 80, SIZE, 1, site="site0", images_per_person=1)
    return folder


@pytest.fixture
def site(tmp_path: Path, faces: Path) -> Home:
    home = Home(tmp_path / "site0")
    allowed: dict[str, Any] = {"tasks": ("train", "mean_image"), "experiments": "any", "epsilon_cap": 20.0}
    settings = SiteConfig(
        alias="site0", address="127.0.0.1:1", data=str(faces), image_size=SIZE, held_out_ratio=0.0,
        head_file=str(tmp_path / "heads" / "0.json"),
        policy=SitePolicy(
            **allowed, unit="person", min_noise_multiplier=0.5, min_images_statistics=2, max_steps_per_round=1000,
            max_rounds_per_day=10,
        ),
    )  # fmt: skip
    save_settings(home, settings)
    write_private(home.data_key, bytes(32))
    scan(home, settings, allow_unreadable=True)
    return home


def federation(tmp_path: Path, handlers: list[Handler]) -> tuple[Path, FakeGrid]:
    home = tmp_path / "coordinator"
    home.mkdir()
    (home / "coordinator.toml").touch()
    shutil.copytree(signing.federation() / "pki", home / "pki")
    registry, sites = Registry(home / "sites.json"), {}
    for number, handler in enumerate(handlers):
        registry.add(f"site{number}", f"ssh-ed25519 key{number}", signing.public_of(f"site{number}"))
        registry.set_node_id(f"site{number}", 100 + number)
        sites[100 + number] = Site(handler)
    return home, FakeGrid(sites)


class Control:
    """Stands in for the connection to the SuperLink: the ServerApp's part is done at submission."""

    def __init__(self, home: Path, grid: FakeGrid) -> None:
        self.home, self.grid = home, grid

    def __enter__(self) -> "Control":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return None

    def submit(self, experiment: Experiment, run: str) -> int:
        conduct(self.grid, self.home, run, experiment, Timing(poll_seconds=0.05))
        return 1

    def run_state(self, _: int) -> Any:
        return SimpleNamespace(is_finished=True)


def ask(tmp_path: Path, handlers: list[Handler], monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[str]]:
    home, grid = federation(tmp_path, handlers)
    monkeypatch.setattr("server.federation.fleet.superlink.connect", lambda _: Control(home, grid))
    said: list[str] = []
    return ask_mean_images(home, EXPERIMENT, said.append, 0.01, deadline_seconds=60.0), said


def answering(pixels: np.ndarray | None = None, name: str = PIXEL_SUM, **fields: Any) -> Handler:
    """A site that says what it likes; by default grey images of 200 persons."""
    total = np.zeros(D, np.float32) if pixels is None else pixels

    def handler(content: RecordDict, _: int) -> RecordDict:
        query = validated(MeanImageQuery, read_header(content))
        good = {"request_digest": query.digest, "status": "released", "num_units": 200.0, "unit": "person"}
        header = header_record(MeanImageAnswer.model_construct(**{**good, "reason": "", **fields}))
        return RecordDict({"arrays": ArrayRecord({name: Array(total)}), "header": header})

    return handler


def test_mean_of_a_real_site_is_near_its_images(
    tmp_path: Path, site: Home, faces: Path, monkeypatch: pytest.MonkeyPatch
):
    run, said = ask(tmp_path, [lambda content, _: answer_mean_image(content, site)], monkeypatch)
    (found,) = load_mean_images(run)
    expected = (open_images(faces, SIZE, tmp_path / "cache").images / 127.5 - 1).mean(0)
    assert found.site == "site0" and said[0].startswith("site0: released: epsilon ")
    # Noise of the stated size, and a count that is wrong by about 2 of 80.
    assert np.std(found.pixels - expected) == pytest.approx(found.deviation, rel=0.3)
    assert 0.05 < found.deviation < 0.2


HOSTILE: dict[str, Handler] = {
    "not finite": answering(np.full(D, np.nan, np.float32)),
    "infinite": answering(np.full(D, np.inf, np.float32)),
    "another type": answering(np.zeros(D, np.uint8)),
    "too short": answering(np.zeros(D - 1, np.float32)),
    "another shape": answering(np.zeros((3, SIZE, SIZE), np.float32)),
    "brighter than images": answering(np.full(D, 1e4, np.float32)),
    "no array": answering(name="other"),
    "nobody": answering(num_units=0.0),
    "negative count": answering(num_units=-500.0),
    "count of a whole country": answering(num_units=9e8),
    "count that is none": answering(num_units=float("nan")),
    "norm beyond the scale": answering(norm=50.0),
    "another unit": answering(unit="image"),
    "another question": answering(request_digest="0" * 64),
    "refusal without code": answering(status="refused"),
    "negative epsilon": answering(epsilon=-1.0),
}


def test_hostile_answers_cost_themselves_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    good = answering(np.full(D, 50.0, np.float32))
    run, said = ask(tmp_path, [good, *HOSTILE.values()], monkeypatch)
    (found,) = load_mean_images(run)
    assert found.site == "site0" and found.pixels == pytest.approx(0.25)
    outcomes = {event["site"]: event["status"] for event in read_metrics(run / "metrics.jsonl") if "site" in event}
    wrong = {name: outcomes[f"site{number}"] for number, name in enumerate(HOSTILE, 1)}
    assert set(wrong.values()) == {"rejected"}, wrong
    assert len(said) == 1 + len(HOSTILE)


def test_without_any_release_the_line_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    refusing = answering(status="refused", refusal="policy", reason="no mean image here", num_units=0.0)
    with pytest.raises(InputError, match=r"no site released a mean image: site0 policy: no mean image here"):
        ask(tmp_path, [refusing], monkeypatch)


def test_experiment_without_mean_image_asks_nobody(tmp_path: Path):
    home, _ = federation(tmp_path, [])
    with pytest.raises(InputError, match="mean_image_noise is 0"):
        ask_mean_images(home, Experiment())
    assert not (home / "runs").exists()


@pytest.mark.parametrize("damage", [b"", b"x" * 100])
def test_damaged_file_of_a_mean_image_is_named(tmp_path: Path, damage: bytes):
    with pytest.raises(InputError, match="holds no mean images"):
        load_mean_images(tmp_path)
    (tmp_path / "sites").mkdir()
    (tmp_path / "sites" / "a.safetensors").write_bytes(damage)
    with pytest.raises(InputError, match=r"a\.safetensors is damaged"):
        load_mean_images(tmp_path)


def test_a_mean_image_is_the_sum_over_the_count_and_says_its_noise():
    """Noise of deviation sigma lies on contributions v = sqrt(1 - b^2) x / |norm|, whose pixels are x."""
    found = mean_of(np.arange(48, dtype=np.float32), 4.0, 0.5, 2.0, "north")
    assert found.site == "north" and np.array_equal(found.pixels, np.arange(48.0).reshape(3, 4, 4) / 4)
    assert found.deviation == pytest.approx(2.0 * 0.5 * np.sqrt(48) / np.sqrt(1 - COUNT_SHARE**2) / 4)
    assert mean_of(np.zeros(48, np.float32), 4.0, 0.5, 0.0, "north").deviation == 0


def test_counts_and_pixels_at_their_limits_are_taken_and_beyond_them_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    least, most = LEAST_COUNT * 0.5 / COUNT_SHARE, EXPERIMENT.federation.max_examples
    counts = {least: "released", 0.999 * least: "rejected", most + least: "released", most + 1.001 * least: "rejected"}
    # As bright as an image can be under noise of the stated size: 1 + LARGEST_NOISE deviations.
    deviation = mean_of(np.zeros(D, np.float32), 200.0, 1.0, 0.5, "").deviation
    bright = 200 * (1 + LARGEST_NOISE * deviation)
    levels = {0.999 * bright: "released", 1.001 * bright: "rejected", -1.001 * bright: "rejected"}
    handlers = [answering(num_units=count) for count in counts]
    handlers += [answering(np.full(D, level, np.float32), norm=1.0) for level in levels]
    run, _ = ask(tmp_path, handlers, monkeypatch)
    outcomes = {event["site"]: event["status"] for event in read_metrics(run / "metrics.jsonl") if "site" in event}
    assert [outcomes[f"site{number}"] for number in range(len(handlers))] == [*counts.values(), *levels.values()]
