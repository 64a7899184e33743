"""Only this federation's coordinator is answered, and every answer is signed: attacks on both, through the handlers."""

import contextlib
import errno
import os
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from flwr.app import ConfigRecord, Context, Message, RecordDict

from client import app, private_files
from client.answers.signed_answer import open_request
from client.home import Home
from client.policy import freshness
from client.records.chain import read_chain
from deploy.identity.keys import load_certificate
from shared.errors import InputError
from shared.messages.audit import AuditAnswer
from shared.messages.envelope import read_header, validated
from shared.messages.sealing import SEAL, digests_of, read_seal, seal_request
from shared.messages.signature import PURPOSES, SignatureError, Statement, check_signature
from shared.messages.training import TrainReply, TrainRequest
from shared.storage import room
from tests.client.conftest import MakeSite, experiment, request_for
from tests.server import fake_grid
from tests.signing import (
    federation,
    key_of,
    make_federation,
    public_of,
    renew_request_key,
    signed_request,
    statement_of,
)

ALIAS = "site0"
PLAIN = experiment()
HANDLERS = {
    "train": app.train,
    "query": app.query,
    "query.audit": app.query_audit,
    "query.offer": app.query_offer,
}
assert fake_grid.Site  # it names the task that Flower's messages need


@pytest.fixture
def home(make_site: MakeSite, monkeypatch: pytest.MonkeyPatch) -> Home:
    """A site that has joined `federation()`."""
    home, _ = make_site()
    monkeypatch.setenv("MASKFED_CLIENT_HOME", str(home.path))
    shutil.copyfile(federation() / "pki" / "ca.crt", home.path / "ca.crt")
    return home


def request(server_round: int = 1) -> RecordDict:
    return request_for(PLAIN, server_round).to_record()


def deliver(content: RecordDict, kind: str = "train") -> RecordDict:
    """What the site answers to a message of this kind."""
    message = Message(content, 100, kind, ttl=60, group_id="1")
    context = Context(run_id=1, node_id=100, node_config={}, state=RecordDict(), run_config={})
    answer: RecordDict = HANDLERS[kind](message, context).content
    return answer


def check_reply(answer: RecordDict, asked: Statement, key: str | None = None) -> None:
    """As the coordinator does."""
    digests = digests_of(answer)
    statement = replace(asked, direction="reply", header_digest=digests.header, arrays_digest=digests.arrays)
    check_signature(key or public_of(ALIAS), statement, read_seal(answer, "reply").signature)


def refusal(answer: RecordDict) -> str | None:
    return TrainReply.from_record(answer, 1).header.refusal


def is_untouched(home: Home) -> bool:
    kinds = [entry.kind for entry in read_chain(home.journal)]
    spent = [entry.kind for entry in read_chain(home.ledger) if entry.kind == "reserve"]
    return not spent and "request" not in kinds and not home.replies.exists()


def test_a_request_of_the_coordinator_is_answered_with_a_signature(home: Home):
    content = request()
    asked = statement_of(content, ALIAS)
    answer = deliver(signed_request(content, asked))
    check_reply(answer, asked)
    assert status_of(answer) == "trained"


def status_of(answer: RecordDict) -> str:
    status: str = read_header(answer)["status"]
    return status


def test_a_stored_reply_is_sent_again_with_the_same_signature(home: Home):
    content = request()
    sealed = signed_request(content, statement_of(content, ALIAS))
    first, second = deliver(sealed), deliver(sealed)
    assert [entry.kind for entry in read_chain(home.ledger)].count("reserve") == 1
    assert first[SEAL] == second[SEAL]
    assert digests_of(first) == digests_of(second)


def unsigned(content: RecordDict, _folder: Path) -> RecordDict:
    return content


def of_another_federation(content: RecordDict, folder: Path) -> RecordDict:
    make_federation(folder / "other")
    return signed_request(content, statement_of(content, ALIAS), folder / "other")


def by_an_uncertified_key(content: RecordDict, _folder: Path) -> RecordDict:
    """The real certificate travels openly; without its key it helps nobody."""
    certificate = signed_request(content, statement_of(content, ALIAS))[SEAL]["certificate"]
    return seal_request(content, statement_of(content, ALIAS), Ed25519PrivateKey.generate(), certificate)


def by_another_site(content: RecordDict, _folder: Path) -> RecordDict:
    certificate = load_certificate(federation() / "pki" / "ca.crt").public_bytes(Encoding.DER)
    return seal_request(content, statement_of(content, ALIAS), key_of("site1"), certificate)


def for_another_site(content: RecordDict, _folder: Path) -> RecordDict:
    return signed_request(content, statement_of(content, "site1"))


def readdressed(content: RecordDict, _folder: Path) -> RecordDict:
    sealed = signed_request(content, statement_of(content, "site1"))
    sealed[SEAL] = ConfigRecord({**sealed[SEAL], "alias": ALIAS})
    return sealed


def for_another_purpose(content: RecordDict, _folder: Path) -> RecordDict:
    return signed_request(content, statement_of(content, ALIAS, "audit"))


def a_reply_as_a_request(content: RecordDict, _folder: Path) -> RecordDict:
    asked = statement_of(content, ALIAS)
    return signed_request(content, Statement(**{**asked.__dict__, "direction": "reply"}))


def other_weights(content: RecordDict, _folder: Path) -> RecordDict:
    other = request_for(PLAIN, 2).to_record()
    other["arrays"]["weights"].data = other["arrays"]["weights"].data[:-4] + b"\x00\x00\x00\x01"
    return RecordDict({**signed_request(content, statement_of(content, ALIAS)), "arrays": other["arrays"]})


def other_header(content: RecordDict, _folder: Path) -> RecordDict:
    sealed = signed_request(content, statement_of(content, ALIAS))
    return RecordDict({**sealed, "header": request(2)["header"]})


def header_of_another_round(content: RecordDict, _folder: Path) -> RecordDict:
    return signed_request(content, statement_of(content, ALIAS, server_round=2))


def with_another_record(content: RecordDict, _folder: Path) -> RecordDict:
    sealed = signed_request(content, statement_of(content, ALIAS))
    return RecordDict({**sealed, "more": ConfigRecord({"json": "{}"})})


ATTACKS = [
    unsigned,
    of_another_federation,
    by_an_uncertified_key,
    by_another_site,
    for_another_site,
    readdressed,
    for_another_purpose,
    a_reply_as_a_request,
    other_weights,
    other_header,
    header_of_another_round,
    with_another_record,
]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_what_the_coordinator_did_not_sign_for_this_site_is_refused_untouched(home: Home, tmp_path: Path, attack: Any):
    answer = deliver(attack(request(), tmp_path))
    assert refusal(answer) == "not_signed"
    assert is_untouched(home)
    assert not home.request_certificate.exists() or attack is header_of_another_round
    assert read_chain(home.journal)[-1].fields["code"] == "not_signed"


def test_audits_and_statistics_are_refused_the_same_way_in_their_own_words(home: Home):
    content = RecordDict({"header": ConfigRecord({"json": '{"schema_version":1,"run":"run"}'})})
    answer = deliver(content, "query.audit")
    assert validated(AuditAnswer, read_header(answer)).refusal == "not_signed"
    assert "not signed" in read_header(deliver(content, "query"))["reason"]
    for kind, purpose in (("query.audit", "audit"), ("query", "statistics")):
        asked = statement_of(content, ALIAS, purpose, server_round=0)
        answer = deliver(signed_request(content, asked), kind)
        check_reply(answer, asked)
        assert status_of(answer) == "refused"
        assert "not signed" not in read_header(answer)["reason"]


def test_a_refusal_is_signed_for_the_place_that_the_request_names(home: Home, tmp_path: Path):
    """So a coordinator whose key ran out reads the reason, and nobody can pass the refusal off as another answer."""
    content = request()
    asked = statement_of(content, ALIAS)
    check_reply(deliver(of_another_federation(content, tmp_path)), asked)
    with pytest.raises(InputError):
        check_reply(deliver(content), asked)


def test_a_request_key_that_was_replaced_is_out_with_the_first_new_request(home: Home, tmp_path: Path):
    own = tmp_path / "coordinator"
    make_federation(own)
    shutil.copyfile(own / "pki" / "ca.crt", home.path / "ca.crt")
    first, second = request(1), request(2)
    old = [
        signed_request(each, statement_of(each, ALIAS, server_round=n), own) for n, each in ((1, first), (2, second))
    ]
    assert status_of(deliver(old[0])) == "trained"
    renew_request_key(own)
    assert status_of(deliver(signed_request(second, statement_of(second, ALIAS, server_round=2), own))) == "trained"
    assert refusal(deliver(old[1])) == "not_signed"
    assert home.request_certificate.stat().st_mode & 0o777 == 0o600


def asked_at(content: RecordDict, seconds: float, server_round: int = 1, run: str = "run") -> RecordDict:
    """The request, signed `seconds` from now, standing for a minute."""
    issued = round(1000 * (time.time() + seconds))
    times = (issued, issued + 60_000)
    return signed_request(content, statement_of(content, ALIAS, run=run, server_round=server_round, times=times))


def test_a_request_whose_time_is_over_is_not_answered(home: Home):
    assert refusal(deliver(asked_at(request(), -61))) == "replayed"
    assert is_untouched(home)


def test_an_old_request_is_not_answered_after_a_newer_one_of_its_run(home: Home):
    old, new = asked_at(request(1), -30, 1), asked_at(request(2), -20, 2)
    assert status_of(deliver(new)) == "trained"
    assert refusal(deliver(old)) == "replayed"
    assert [entry.kind for entry in read_chain(home.ledger)].count("reserve") == 1
    assert home.asked.stat().st_mode & 0o777 == 0o600


def test_a_question_of_another_kind_is_answered_once(home: Home):
    content = RecordDict({"header": ConfigRecord({"json": '{"schema_version":1,"run":"run"}'})})
    asked = statement_of(content, ALIAS, "audit", server_round=0)
    sealed = signed_request(content, asked)
    reasons = [read_header(deliver(sealed, "query.audit"))["refusal"] for _ in range(2)]
    assert reasons[0] != reasons[1] == "replayed"


def test_a_question_that_comes_twice_at_once_is_taken_once(home: Home, monkeypatch: pytest.MonkeyPatch):
    """Two runs have two processes, so whoever delivers a message twice finds both of them reading."""
    content = RecordDict({"header": ConfigRecord({"json": '{"schema_version":1,"run":"run"}'})})
    sealed = signed_request(content, statement_of(content, ALIAS, "audit", server_round=0))
    write, taken, others = freshness.write_private, list[str](), list[threading.Thread]()

    def take() -> None:
        with contextlib.suppress(SignatureError):
            taken.append(open_request(sealed, home, "audit", ALIAS).run)

    def write_slowly(path: Path, data: bytes) -> None:
        if not others:
            others.append(threading.Thread(target=take))
            others[0].start()
            others[0].join(0.3)  # time to be taken, too, were it not for the lock
        write(path, data)

    monkeypatch.setattr(freshness, "write_private", write_slowly)
    take()
    others[0].join()
    assert taken == ["run"]
    assert (home.path / "asked.lock").stat().st_mode & 0o777 == 0o600


def test_the_answer_to_an_old_question_is_not_one_to_the_same_question_asked_again(home: Home):
    content, times = request(), (1_800_000_000_000, 4_000_000_000_000)
    old, new = statement_of(content, ALIAS), statement_of(content, ALIAS, times=times)
    answer = deliver(signed_request(content, old))
    check_reply(answer, old)
    with pytest.raises(InputError):
        check_reply(answer, new)
    # The stored reply is sent again under the new question's seal.
    check_reply(deliver(signed_request(content, new)), new)


def test_a_damaged_memory_of_questions_answers_nobody(home: Home):
    home.asked.write_text("[1]")
    assert refusal(deliver(asked_at(request(), 0))) == "replayed"
    assert is_untouched(home)


def test_a_request_that_signed_but_makes_no_sense_is_malformed_not_unsigned(home: Home):
    content = RecordDict({"header": ConfigRecord({"json": "no JSON"})})
    asked = statement_of(content, ALIAS)
    answer = deliver(signed_request(content, asked))
    check_reply(answer, asked)
    assert refusal(answer) == "malformed"


def test_a_site_without_its_key_says_what_makes_it(home: Home):
    home.signing_key.unlink()
    with pytest.raises(InputError, match="maskfed-client enroll"):
        deliver(request())
    assert is_untouched(home)


def test_nothing_is_computed_before_the_signature_is_checked(home: Home, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any) -> Any:
        raise AssertionError("parsed an unsigned request")

    monkeypatch.setattr(TrainRequest, "from_record", fail)
    monkeypatch.setattr("client.answers.signed_answer.read_header", fail)
    assert refusal(deliver(request())) == "not_signed"


@pytest.mark.parametrize("kind", ["train", "query", "query.audit", "query.offer"])
def test_every_answer_waits_for_room_on_the_disk(home: Home, monkeypatch: pytest.MonkeyPatch, kind: str):
    """The first thing that is written for a question is waited with, so nothing is computed or charged before."""
    tries: list[Path] = []
    write = private_files.write_atomically

    def full_at_first(path: Path, data: bytes, mode: int, **more: Any) -> None:
        tries.append(path)
        if len(tries) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, data, mode, **more)

    looks = iter([False, False])
    monkeypatch.setattr(room, "has_room", lambda *_: next(looks, True))
    monkeypatch.setattr(room, "LOOK_SECONDS", 0.001)
    monkeypatch.setattr(private_files, "write_atomically", full_at_first)
    content = request()
    answer = deliver(signed_request(content, statement_of(content, ALIAS, PURPOSES[kind])), kind)
    assert tries[0] == tries[1]
    assert "disk" not in str(read_header(answer))
    assert next(looks, None) is None
