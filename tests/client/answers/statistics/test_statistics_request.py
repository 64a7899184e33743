"""Questions for statistics: what is answered, and that nothing else leaves."""

import errno
from typing import Any

import pytest
from flwr.app import ConfigRecord, RecordDict

from client.answers.statistics.statistics_request import answer_query
from client.home import Home
from client.records.chain import Chain, read_chain
from client.records.ledger import read_ledger
from shared.evaluation.networks import load_extractor
from shared.messages.envelope import read_header, validated
from shared.messages.statistics import StatisticsAnswer, StatisticsQuery
from tests.client.conftest import MakeSite

ALLOWED = {"tasks": ("statistics",), "min_images_statistics": 2, "extractors": ("random-inception",)}


@pytest.fixture(scope="module")
def question() -> RecordDict:
    space = load_extractor("random-inception").space
    query = StatisticsQuery(
        run="ask", kind="exact", extractor=space.extractor, layer=space.layer, extractor_sha256=space.sha256
    )
    return RecordDict({"header": ConfigRecord({"json": query.model_dump_json()})})


def ask(home: Home, question: RecordDict) -> StatisticsAnswer:
    return validated(StatisticsAnswer, read_header(answer_query(question, home)))


def kinds(home: Home) -> list[str]:
    return [entry.kind for entry in read_chain(home.journal)]


def fail_at(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    append = Chain.append

    def full(self: Chain, each: str, **fields: Any) -> Any:
        if each == kind:
            raise OSError(errno.ENOSPC, "No space left on device", "/home/alice/site/journal.jsonl")
        return append(self, each, **fields)

    monkeypatch.setattr(Chain, "append", full)


def test_release_is_asked_for_and_recorded(make_site: MakeSite, question: RecordDict):
    home, _ = make_site(**ALLOWED)
    assert ask(home, question).status == "released"
    assert kinds(home) == ["request", "release"]


def test_refusal_that_cannot_be_recorded_is_a_refusal_all_the_same(
    make_site: MakeSite, question: RecordDict, monkeypatch: pytest.MonkeyPatch
):
    home, _ = make_site(**{**ALLOWED, "tasks": ("train",)})
    fail_at(monkeypatch, "refusal")
    answer = ask(home, question)
    assert (answer.status, answer.reason) == (
        "refused",
        "policy.tasks does not list `statistics`: this site releases none",
    )
    assert kinds(home) == ["request"]


@pytest.mark.parametrize(("kind", "charged", "recorded"), [("request", 0, ["refusal"]), ("reserve", 0, None),
                                                           ("commit", 1, None), ("release", 1, None)])  # fmt: skip
def test_full_disk_refuses_without_a_path_and_keeps_the_order_of_records(
    make_site: MakeSite,
    question: RecordDict,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    charged: int,
    recorded: list[str] | None,
):
    home, _ = make_site(**ALLOWED)
    fail_at(monkeypatch, kind)
    answer = ask(home, question)
    assert (answer.status, answer.reason) == ("refused", "the site's disk is full")
    assert kinds(home) == (recorded or ["request", "refusal"])
    assert len(read_ledger(home.ledger).charges) == charged


def test_what_an_operator_must_cure_is_not_told(make_site: MakeSite, question: RecordDict):
    home, _ = make_site(**{**ALLOWED, "extractors": ("random-inception", "inception-v3-compat=/secret/weights.pth")})
    settings = home.settings.read_text()
    home.settings.write_text(settings.replace("random-inception", "onnx:/secret/net.onnx"))
    answer = ask(home, question)
    assert (answer.status, answer.reason) == (
        "refused",
        "the site's work failed; its operator finds the cause in the site's log",
    )
    home.settings.write_text(settings)
    (home.datasets / "current").unlink()
    assert ask(home, question).reason == "the site's images are not scanned"


@pytest.mark.parametrize("text", ["{", "{}", None])
def test_question_out_of_protocol_is_refused(make_site: MakeSite, text: str | None):
    home, _ = make_site(**ALLOWED)
    record = RecordDict({"header": ConfigRecord({"json": text})} if text else {})
    assert ask(home, record).reason == "the request does not follow the protocol of this version"
    assert kinds(home) == ["refusal"]
