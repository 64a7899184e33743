"""Statistics in a masked sum, by the very handlers of sites: one roster a data set, all of it, and nobody's alone."""

import hashlib
import itertools
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, RecordDict

from client.answers.statistics import site_statistics
from client.answers.statistics.statistics_request import answer_query
from client.data.dataset import open_dataset, scan
from client.home import Home
from client.policy.approval import approve
from client.private_files import write_private
from client.records.chain import read_chain
from client.records.ledger import read_ledger
from client.secure.rosters import answer_keys
from client.secure.unmask import answer_unmask
from client.settings import SiteConfig, SitePolicy, load_settings, save_settings
from server.evaluation.federated_reference import POOLED_FILE, ask_sites, question_for, write_question
from server.evaluation.masked_reference import gather_sum
from server.federation.fleet.registry import Registry
from server.federation.messaging.transport import Timing
from server.runs.run_directory import create
from shared.data.synthetic import generate, write_folder
from shared.errors import InputError
from shared.evaluation.feature_statistics import accumulate, load_statistics
from shared.evaluation.networks import load_extractor
from shared.evaluation.private_statistics import make_projection, private_distance, save_projection
from shared.experiment.config import parse_experiment
from shared.messages.envelope import read_header, validated
from shared.messages.secure_sum.unmask import read_unmask_answer, read_unmask_query, unmask_record
from shared.messages.statistics import StatisticsAnswer
from shared.storage.runlog import read_metrics
from tests import signing
from tests.server.fake_grid import FakeGrid, Site

QUICK = Timing(poll_seconds=0.02)
EXPERIMENT = parse_experiment("[model]\nimage_size = 16\npatch_size = 8\n[federation]\nsecure = true\n")
NUM_SITES, NUM_IMAGES = 4, (5, 6, 7, 8)
ALLOWED = {"tasks": ("statistics",), "require_dp": False, "epsilon_cap": 10.0, "min_images_statistics": 2}


@pytest.fixture(scope="module")
def extractor():
    return load_extractor("random-inception")


@pytest.fixture(scope="module")
def scanned(tmp_path_factory):
    """Four sites with few images each, as they are before any question: restored for each test."""
    root = tmp_path_factory.mktemp("sites")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASKFED_REGISTRY", str(root / "live" / "registry"))
        for number, count in enumerate(NUM_IMAGES):
            home, faces = Home(root / "live" / f"site{number}"), root / "live" / f"faces{number}"
            write_folder(faces, count, 16, 1, site=f"site{number}")
            policy = SitePolicy(**{**ALLOWED, "extractors": ("random-inception",), "secure": {"rosters": "any"}})
            settings = SiteConfig(
                alias=f"site{number}",
                address="127.0.0.1:1",
                data=str(faces),
                image_size=16,
                held_out_ratio=0.0,
                head_file=str(root / "live" / "heads" / f"{number}.json"),
                policy=policy,
            )
            save_settings(home, settings)
            write_private(home.signing_key, signing.pem_of(signing.key_of(settings.alias)))
            scan(home, settings)
    shutil.copytree(root / "live", root / "kept", symlinks=True)
    return root


class Sites:
    """The sites of one test, and a coordinator that asks them."""

    def __init__(self, root, tmp_path):
        shutil.rmtree(root / "live")
        shutil.copytree(root / "kept", root / "live", symlinks=True)
        self.homes = [Home(root / "live" / f"site{number}") for number in range(NUM_SITES)]
        self.home, self.count = tmp_path / "coordinator", itertools.count()
        self.home.mkdir()
        (self.home / "coordinator.toml").touch()
        registry = Registry(self.home / "sites.json")
        for number in range(NUM_SITES):
            registry.add(f"site{number}", f"ssh-ed25519 key{number}", signing.public_of(f"site{number}"))
            registry.set_node_id(f"site{number}", 100 + number)
        self.grid = FakeGrid({100 + number: self.site(home) for number, home in enumerate(self.homes)})
        self.asked, self.unmasked = [], []

    def site(self, home):
        def answered(content, _):
            self.asked.append((home, content))
            return answer_query(content, home)

        def unmasked(content):
            self.unmasked.append((home, read_unmask_query(content)))
            return answer_unmask(content, home)

        return Site(answered, queries={"query.secure_keys": lambda content: answer_keys(content, home),
                                       "query.unmask": unmasked})  # fmt: skip

    def ask(self, question, absent=()):
        """The run's folder after a question to all but some sites."""
        for number in range(NUM_SITES):
            self.grid.sites[100 + number].is_online = number not in absent
        query = question.query.model_copy(update={"run": f"statistics-{next(self.count)}"})
        run = create(self.home / "runs" / query.run, EXPERIMENT)
        write_question(run.path, type(question)(query, question.width, question.projection))
        gather_sum(self.grid, self.home, run.path, EXPERIMENT, QUICK)
        return run

    def charges(self):
        return [len(read_ledger(home.ledger).charges) for home in self.homes]


@pytest.fixture
def sites(scanned, tmp_path, monkeypatch):
    monkeypatch.setenv("MASKFED_REGISTRY", str(scanned / "live" / "registry"))
    return Sites(scanned, tmp_path)


def exact_question(extractor):
    return question_for("exact", 1.1, None, extractor.space, extractor.width)


def reasons_of(run):
    return " ".join(event["reason"] for event in read_metrics(run.metrics) if "reason" in event)


def own_statistics(home, extractor):
    data = open_dataset(home, 16)
    return accumulate([extractor(data.images.batch(data.train))], extractor.space)


def test_the_masked_sum_is_the_statistics_of_the_union_and_no_file_of_one_site_is_there(sites, extractor):
    run = sites.ask(exact_question(extractor))
    pooled, parts = load_statistics(run.path / POOLED_FILE), [own_statistics(home, extractor) for home in sites.homes]
    assert (pooled.n, pooled.release, pooled.site) == (sum(NUM_IMAGES), "exact", "site0+site1+site2+site3")
    np.testing.assert_allclose(pooled.total_D, sum(part.total_D for part in parts), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(pooled.outer_DD, sum(part.outer_DD for part in parts), rtol=1e-5, atol=1e-5)
    assert not (run.path / "sites").exists()
    for home, content in sites.asked:
        assert not answer_query(content, home).array_records["arrays"]  # asked again it gives nothing more
        (release_entry,) = (each for each in read_chain(home.journal) if each.fields.get("task") == "statistics"
                            and each.kind == "release")  # fmt: skip
        assert release_entry.fields["numbers"] == ["masked statistics, of no use alone"]
    assert sites.charges() == [1] * NUM_SITES
    ledger = read_ledger(sites.homes[0].ledger)
    assert ledger.total(open_dataset(sites.homes[0], 16).dataset_id, 1e-5, lambda *_: 0.0).is_unbounded


def test_the_same_roster_may_ask_again_and_another_one_is_refused_over_restarts_and_not_charged(sites, extractor):
    question = exact_question(extractor)
    first = load_statistics(sites.ask(question).path / POOLED_FILE)
    again = load_statistics(sites.ask(question).path / POOLED_FILE)
    assert again.n == first.n and (again.outer_DD == first.outer_DD).all()
    run = sites.ask(question, absent=(2,))
    assert not (run.path / POOLED_FILE).exists()
    assert reasons_of(run).count("added up with another roster") == 3 and "0 of the 3 sites" in reasons_of(run)
    assert sites.charges() == [2] * NUM_SITES


def test_without_that_memory_two_rosters_tell_one_sites_statistics(sites, extractor, monkeypatch):
    """The attack that the memory forbids works without it, so that the refusals above are what keeps it out."""
    monkeypatch.setattr(site_statistics, "check_earlier_sums", lambda *_: None)
    question = exact_question(extractor)
    every, some = (load_statistics(sites.ask(question, absent).path / POOLED_FILE) for absent in ((), (2,)))
    target = own_statistics(sites.homes[2], extractor)
    assert every.n - some.n == target.n
    np.testing.assert_allclose(every.total_D - some.total_D, target.total_D, rtol=1e-4, atol=1e-5)


def test_an_image_that_came_or_went_since_is_not_told_by_a_second_sum(sites, extractor):
    question = exact_question(extractor)
    assert (sites.ask(question).path / POOLED_FILE).exists()
    home = sites.homes[1]
    settings = load_settings(home)
    min(Path(settings.data).rglob("*.png")).unlink()
    scan(home, settings)
    run = sites.ask(question)
    assert "the site's policy refuses this" in reasons_of(run)
    assert not (run.path / POOLED_FILE).exists()
    assert sites.charges() == [2, 1, 2, 2] and len(sites.unmasked) == NUM_SITES


def test_an_exact_sum_lacks_nobody(sites, extractor):
    """One site does not answer: what the others gave stays masked, and none of them gives anything back."""
    sites.grid.sites[103].answer = lambda *_: RecordDict({"header": ConfigRecord({"json": "{"})})
    run = sites.ask(exact_question(extractor))
    assert not (run.path / POOLED_FILE).exists() and not sites.unmasked
    assert "3 of the 4 sites whose exact statistics make a sum have answered; missing: site3" in reasons_of(run)


def test_a_coordinator_that_asks_for_less_than_the_roster_or_twice_is_refused(sites, extractor):
    sites.ask(exact_question(extractor))
    home, query = sites.unmasked[0]
    # Another question of the same roster, of which nothing was given back yet.
    for each in sites.grid.sites.values():
        each.queries["query.unmask"] = lambda _: RecordDict({})
    sites.ask(exact_question(extractor))
    content = next(content for asked, content in reversed(sites.asked) if asked == home)
    header = read_header(content)
    fewer = query.model_copy(update={
        "run": header["run"],
        "request_digest": hashlib.sha256(str(content["header"]["json"]).encode()).hexdigest(),
        "survivors": query.survivors[:3],
        "boxes": query.boxes[:3],
    })  # fmt: skip
    answer = read_unmask_answer(answer_unmask(unmask_record(fewer), home))
    assert answer.refusal == "secure_sum" and "3 updates in the sum, this site asks for 4" in answer.reason
    before = sites.charges()
    replayed = validated(StatisticsAnswer, read_header(answer_query(content, home)))
    assert replayed.status == "refused" and "gives it once" in replayed.reason
    assert sites.charges() == before


def test_private_ones_are_charged_as_before_and_their_noise_adds_up(sites, extractor, tmp_path, monkeypatch):
    public = extractor(torch.from_numpy(generate(40, 16, 0)[0]))
    projection = make_projection(public, extractor.space, 3)
    save_projection(projection, tmp_path / "p.safetensors")
    for home in sites.homes:
        approve(home, "projection", projection.projected_space.sha256)
    question = question_for("dp", 1.2, tmp_path / "p.safetensors", extractor.space, extractor.width)
    some = load_statistics(sites.ask(question, absent=(2,)).path / POOLED_FILE)
    assert (some.images["parts"], some.space, some.release) == ("3", projection.projected_space, "dp")
    assert some.epsilon > 1 and some.n != round(some.n)
    assert private_distance(projection.statistics(public), some).resolution > 0
    charge = read_ledger(sites.homes[0].ledger).charges[-1][1]
    assert (charge.mechanism, charge.noise_multiplier, charge.steps) == ("gaussian", 1.2, 1)
    assert sites.charges() == [1, 1, 0, 1]
    # Each of them is private by itself, so that another roster is answered, and charged, too.
    monkeypatch.setattr("client.privacy.epsilon.epsilon_of", lambda *_: 1.5)
    assert load_statistics(sites.ask(question).path / POOLED_FILE).images["parts"] == "4"
    assert sites.charges() == [2, 2, 1, 2]


def test_unknown_sites_in_the_roster_are_refused_before_anything_is_charged(sites, extractor):
    for home in sites.homes:
        text = home.settings.read_text()
        home.settings.write_text(text.replace('rosters = "any"', 'rosters = "approved"'))
    run = sites.ask(exact_question(extractor))
    assert "roster_not_approved" in reasons_of(run) and not sites.asked and sites.charges() == [0] * NUM_SITES


def test_the_evaluator_is_told_why_there_is_no_sum(sites, extractor, monkeypatch):
    sites.grid.sites[101].answer = lambda *_: RecordDict({"header": ConfigRecord({"json": "{"})})

    class Control:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def submit(self, experiment, run):
            gather_sum(sites.grid, sites.home, sites.home / "runs" / run, experiment, QUICK)
            return 1

        def run_state(self, _):
            return SimpleNamespace(is_finished=True)

    monkeypatch.setattr("server.federation.fleet.superlink.connect", lambda _: Control())
    with pytest.raises(InputError, match=r"no sum of statistics: 3 of the 4 sites .* missing: site1"):
        ask_sites(sites.home, EXPERIMENT, exact_question(extractor), poll_seconds=0.01)
