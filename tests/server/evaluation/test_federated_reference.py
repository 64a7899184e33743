"""Statistics of all sites by messages: the very handlers of a site behind a stand-in for Flower's grid."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from client.answers.statistics.statistics_request import answer_query
from client.data.dataset import open_dataset, scan
from client.home import Home
from client.policy.approval import approve
from client.settings import SiteConfig, SitePolicy, save_settings
from server.app import conduct
from server.evaluation.federated_reference import POOLED_FILE, ask_sites, gather, question_for, write_question
from server.federation.fleet.registry import Registry
from server.federation.fleet.superlink_types import ControlError
from server.federation.messaging.transport import Timing
from server.runs.run_directory import create
from shared.data.synthetic import generate, write_folder
from shared.errors import InputError
from shared.evaluation.feature_statistics import FeatureSpace, load_statistics, statistics_bytes, statistics_of
from shared.evaluation.networks import load_extractor
from shared.evaluation.private_statistics import make_projection, private_distance, save_projection
from shared.experiment.config import parse_experiment
from shared.storage.runlog import read_metrics
from tests import signing
from tests.server.fake_grid import FakeGrid, Site

QUICK = Timing(poll_seconds=0.05)
EXPERIMENT = parse_experiment("[model]\nimage_size = 16\npatch_size = 8\n")


@pytest.fixture(scope="module")
def extractor():
    return load_extractor("random-inception")


def make_site(tmp_path: Path, number: int, **policy) -> Home:
    home = Home(tmp_path / f"site{number}")
    write_folder(tmp_path / f"faces{number}", 16 + 8 * number, 16, 1, site=f"site{number}")
    allowed = {"tasks": ("statistics",), "require_dp": False, "epsilon_cap": 10.0, "min_images_statistics": 2}
    settings = SiteConfig(
        alias=f"site{number}",
        address="127.0.0.1:1",
        data=str(tmp_path / f"faces{number}"),
        image_size=16,
        held_out_ratio=0.0,
        head_file=str(tmp_path / "heads" / f"{number}.json"),
        policy=SitePolicy(**{**allowed, "extractors": ("random-inception",), **policy}),
    )
    save_settings(home, settings)
    scan(home, settings)
    return home


def federation(tmp_path, homes, answers=()):
    """Coordinator's folder and a grid whose nodes are these sites, then those that answer as told."""
    home = tmp_path / "coordinator"
    home.mkdir(exist_ok=True)
    (home / "coordinator.toml").touch()
    shutil.copytree(signing.federation() / "pki", home / "pki", dirs_exist_ok=True)
    registry, sites = Registry(home / "sites.json"), {}
    handlers = [lambda content, _, place=place: answer_query(content, place) for place in homes]
    for number, handler in enumerate([*handlers, *answers]):
        registry.add(f"site{number}", f"ssh-ed25519 key{number}", signing.public_of(f"site{number}"))
        registry.set_node_id(f"site{number}", 100 + number)
        sites[100 + number] = Site(handler)
    return home, FakeGrid(sites)


class Control:
    """Stands in for the connection to the SuperLink: `work` is done at submission; `stopped` are the runs it ended."""

    def __init__(self, work, *, is_finished=True):
        self.work, self.is_finished, self.stopped = work, is_finished, []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def submit(self, experiment, run):
        self.work(experiment, run)
        return 1

    def run_state(self, run_id):
        return SimpleNamespace(is_finished=self.is_finished)

    def stop(self, run_id):
        self.stopped.append(run_id)


def ask(home, grid, question, monkeypatch):
    """`ask_sites` with the ServerApp's part run at once in place of a submission."""

    monkeypatch.setattr(
        "server.federation.fleet.superlink.connect",
        lambda _: Control(lambda experiment, run: conduct(grid, home, run, experiment, QUICK)),
    )
    said = []
    return ask_sites(home, EXPERIMENT, question, said.append, poll_seconds=0.01), said


def test_pooled_statistics_equal_those_of_the_union(tmp_path, extractor, monkeypatch):
    homes = [make_site(tmp_path, number) for number in range(2)]
    home, grid = federation(tmp_path, homes)
    pooled, said = ask(home, grid, question_for("exact", 1.1, None, extractor.space, extractor.width), monkeypatch)
    data = [open_dataset(place, 16) for place in homes]
    union = torch.cat([each.images.batch(each.train) for each in data])
    expected = statistics_of(extractor(union), extractor.space)
    found = load_statistics(pooled)
    np.testing.assert_allclose(found.outer_DD, expected.outer_DD, rtol=1e-6)
    assert found.n == len(union) and found.release == "exact" and found.site == "site0+site1"
    assert sorted(said) == ["site0: released", "site1: released"]


def test_private_statistics_come_with_their_noise(tmp_path, extractor, monkeypatch):
    public = extractor(torch.from_numpy(generate(60, 16, 0)[0]))
    projection = make_projection(public, extractor.space, 4)
    save_projection(projection, tmp_path / "p.safetensors")
    homes = [make_site(tmp_path, 0, require_dp=True)]
    approve(homes[0], "projection", projection.projected_space.sha256)
    home, grid = federation(tmp_path, homes)
    question = question_for("dp", 1.2, tmp_path / "p.safetensors", extractor.space, extractor.width)
    found = load_statistics(ask(home, grid, question, monkeypatch)[0])
    assert found.release == "dp" and found.space == projection.projected_space
    assert private_distance(projection.statistics(public), found).resolution > 0


def test_refusals_are_told_and_others_still_count(tmp_path, extractor, monkeypatch):
    homes = [make_site(tmp_path, 0), make_site(tmp_path, 1, tasks=("train",)), make_site(tmp_path, 2, extractors=())]
    home, grid = federation(tmp_path, homes)
    pooled, said = ask(home, grid, question_for("exact", 1.1, None, extractor.space, extractor.width), monkeypatch)
    assert load_statistics(pooled).site == "site0"
    assert any("site1: refused" in line and "does not list" in line for line in said)
    assert any("site2: refused" in line and "not in policy.extractors" in line for line in said)


def test_without_any_release_the_line_says_why(tmp_path, extractor, monkeypatch):
    home, grid = federation(tmp_path, [make_site(tmp_path, 0, tasks=("train",))])
    with pytest.raises(InputError, match=r"no site released statistics: site0 policy\.tasks"):
        ask(home, grid, question_for("exact", 1.1, None, extractor.space, extractor.width), monkeypatch)
    with pytest.raises(InputError, match=r"coordinator\.toml"):
        ask_sites(tmp_path / "nowhere", EXPERIMENT, question_for("exact", 1.1, None, extractor.space, extractor.width))
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(InputError, match="--home"):
        ask_sites(None, EXPERIMENT, question_for("exact", 1.1, None, extractor.space, extractor.width))
    with pytest.raises(InputError, match="go together"):
        question_for("dp", 1.1, None, extractor.space, extractor.width)


def test_hostile_answers_are_rejected(tmp_path, extractor):
    def answer(text):
        return lambda *_: RecordDict({"header": ConfigRecord({"json": text})})

    place = make_site(tmp_path, 5)
    released = json.dumps({"schema_version": 1, "status": "released"})
    # The first site answers with another one's statistics, the second without any, the third not in the protocol.
    answers = [lambda content, _: answer_query(content, place), answer(released), answer("{")]
    home, grid = federation(tmp_path, [], answers)
    question = question_for("exact", 1.1, None, extractor.space, extractor.width)
    run = create(home / "runs" / question.query.run, EXPERIMENT)
    write_question(run.path, question)
    gather(grid, home, run.path, EXPERIMENT, QUICK)
    outcome = {event["site"]: event["status"] for event in read_metrics(run.metrics) if event["kind"] == "statistics"}
    assert outcome == {"site0": "rejected", "site1": "rejected", "site2": "rejected"}
    assert not (run.path / POOLED_FILE).exists() and not (run.path / "sites").exists()


def hostile(change, extractor):
    """An answer with statistics of three images, changed, or with the header's text replaced."""

    def answer(_content, _asked):
        features = np.random.default_rng(0).normal(size=(3, extractor.width))
        statistics = replace(statistics_of(features, extractor.space), site="site0", release="exact")
        text = json.dumps({"schema_version": 1, "status": "released"})
        if isinstance(change, str):
            text = change
        else:
            statistics = change(statistics)
        file = Array(np.frombuffer(statistics_bytes(statistics), np.uint8))
        return RecordDict({"arrays": ArrayRecord({"file": file}), "header": ConfigRecord({"json": text})})

    return answer


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("[" * 3_000_000, "not JSON"),
        ('{"schema_version": 1, "status": ' + "9" * 5000 + "}", "out of range"),
        (lambda each: replace(each, n=1e12), "federation.max_examples"),
        (lambda each: replace(each, n=-1000.0), "greater than 0"),
        (lambda each: replace(each, n=0.0), "greater than 0"),
        (lambda each: replace(each, total_D=np.zeros(3), outer_DD=np.zeros((3, 3))), "width 3"),
        (lambda each: replace(each, images=["a"]), "images"),
        (lambda each: replace(each, images={str(index): "x" for index in range(99)}), "images"),
        (lambda each: replace(each, epsilon=1e308), "epsilon"),
        (lambda each: replace(each, source=["\x1b[2J"]), "source"),
        (lambda each: replace(each, space=FeatureSpace("other", "64", "0" * 64)), "do not compare"),
    ],
)
def test_a_hostile_answer_costs_itself_and_not_the_honest_one(tmp_path, extractor, change, words):
    home, grid = federation(tmp_path, [], [hostile(change, extractor)])
    honest = make_site(tmp_path, 1)
    Registry(home / "sites.json").add("site1", "ssh-ed25519 key1", signing.public_of("site1"))
    Registry(home / "sites.json").set_node_id("site1", 101)
    grid.sites[101] = Site(lambda content, _: answer_query(content, honest), delay_seconds=0.3)
    question = question_for("exact", 1.1, None, extractor.space, extractor.width)
    run = create(home / "runs" / question.query.run, EXPERIMENT)
    write_question(run.path, question)
    gather(grid, home, run.path, EXPERIMENT, QUICK)
    events = {event["site"]: event for event in read_metrics(run.metrics) if event["kind"] == "statistics"}
    assert (events["site0"]["status"], events["site1"]["status"]) == ("rejected", "released")
    assert words in events["site0"]["reason"] and events["site0"]["reason"].isprintable()
    assert [path.name for path in (run.path / "sites").iterdir()] == ["site1.safetensors"]


def test_a_silent_site_does_not_hold_up_the_others(tmp_path, extractor):
    home, grid = federation(tmp_path, [make_site(tmp_path, 0)], [lambda *_: None])
    question = question_for("exact", 1.1, None, extractor.space, extractor.width)
    run = create(home / "runs" / question.query.run, EXPERIMENT)
    write_question(run.path, question)
    gather(grid, home, run.path, EXPERIMENT, QUICK, deadline_seconds=8.0)
    outcome = {event["site"]: event["status"] for event in read_metrics(run.metrics) if event["kind"] == "statistics"}
    assert outcome == {"site0": "released", "site1": "late"}


def test_an_answer_that_the_decoder_cannot_read_costs_that_answer_only(tmp_path, extractor):
    class HostileGrid(FakeGrid):
        def push_messages(self, messages):
            messages = list(messages)
            ids = super().push_messages(messages)
            self.hostile = dict(zip(ids, [message.metadata.dst_node_id == 101 for message in messages], strict=True))
            return ids

        def pull_messages(self, message_ids):
            if any(self.hostile[message_id] for message_id in message_ids):
                raise ValueError("Unexpected format for object content.")
            return super().pull_messages(message_ids)

    home, grid = federation(tmp_path, [make_site(tmp_path, 0)], [lambda *_: None])
    question = question_for("exact", 1.1, None, extractor.space, extractor.width)
    run = create(home / "runs" / question.query.run, EXPERIMENT)
    write_question(run.path, question)
    gather(HostileGrid(grid.sites), home, run.path, EXPERIMENT, QUICK, deadline_seconds=60.0)
    events = [event for event in read_metrics(run.metrics) if event["kind"] == "statistics"]
    assert {event["site"]: (event["status"], event["reason"]) for event in events} == {
        "site0": ("released", ""),
        "site1": ("failed", "unreadable reply (ValueError)"),
    }


def test_a_question_that_does_not_end_is_stopped(tmp_path, extractor, monkeypatch):
    control = Control(lambda *_: None, is_finished=False)
    monkeypatch.setattr("server.federation.fleet.superlink.connect", lambda _: control)
    monkeypatch.setattr("server.federation.messaging.question.OVERDUE_SECONDS", 0.05)
    monkeypatch.setattr("server.evaluation.federated_reference.DEADLINE_SECONDS", 0.05)
    home, _ = federation(tmp_path, [])
    question = question_for("exact", 1.1, None, extractor.space, extractor.width)
    with pytest.raises(ControlError, match=f"maskfed-server logs {question.query.run}"):
        ask_sites(home, EXPERIMENT, question, poll_seconds=0.01)
    assert control.stopped == [1]


def test_a_question_that_could_not_be_sent_leaves_nothing(tmp_path, extractor, monkeypatch):
    def unreachable(_):
        raise RuntimeError("the SuperLink does not answer")

    monkeypatch.setattr("server.federation.fleet.superlink.connect", unreachable)
    home, _ = federation(tmp_path, [])
    with pytest.raises(RuntimeError, match="does not answer"):
        ask_sites(home, EXPERIMENT, question_for("exact", 1.1, None, extractor.space, extractor.width))
    assert list((home / "runs").iterdir()) == []
