"""Seals on Flower's messages: whatever is changed in a message after it was signed is noticed before it is parsed."""

from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.messages.sealing import SEAL, digests_of, read_seal, seal_reply
from shared.messages.signature import SignatureError, Statement, check_signature
from tests.signing import key_of, public_of, signed_request, statement_of

ASKED = Statement("train", "request", "run", 1, "site-0", "a" * 64, "b" * 64, "c" * 64, 1000, 2000)
HEADER = '{"status":"trained"}'


def reply(header: str = HEADER, **arrays: np.ndarray) -> RecordDict:
    arrays = arrays or {"update": np.arange(5, dtype=np.float32), "second": np.ones(3, np.float32)}
    records = ArrayRecord({name: Array(value) for name, value in arrays.items()})
    return RecordDict({"arrays": records, "header": ConfigRecord({"json": header})})


def check(content: RecordDict, alias: str = "site-0") -> None:
    """As the coordinator does, with the key of `alias`."""
    digests = digests_of(content)
    statement = replace(ASKED, direction="reply", header_digest=digests.header, arrays_digest=digests.arrays)
    check_signature(public_of(alias), statement, read_seal(content, "reply").signature)


def sealed(content: RecordDict | None = None) -> RecordDict:
    return seal_reply(content or reply(), ASKED, key_of("site-0"))


def test_an_honest_reply_is_genuine_and_signed_the_same_way_each_time():
    check(sealed())
    assert sealed()[SEAL] == sealed()[SEAL]
    check(seal_reply(RecordDict({"header": ConfigRecord({"json": HEADER})}), ASKED, key_of("site-0")))


@settings(max_examples=80)
@given(st.data())
def test_any_changed_byte_of_header_or_arrays_is_refused(data):
    content = sealed()
    where = data.draw(st.sampled_from(["header", "update", "second", "signature"]))
    if where == "header":
        text = content["header"]["json"]
        position = data.draw(st.integers(0, len(text) - 1))
        letter = data.draw(st.characters(codec="utf-8").filter(lambda each: each != text[position]))
        content["header"]["json"] = text[:position] + letter + text[position + 1 :]
    else:
        record = content[SEAL] if where == "signature" else None
        old = record["signature"] if record is not None else content["arrays"][where].data
        position, change = data.draw(st.integers(0, len(old) - 1)), data.draw(st.integers(1, 255))
        new = old[:position] + bytes([old[position] ^ change]) + old[position + 1 :]
        if record is not None:
            record["signature"] = new
        else:
            array = content["arrays"][where]
            content["arrays"][where] = Array(array.dtype, array.shape, array.stype, new)
    with pytest.raises(SignatureError):
        check(content)


def _renamed(content):
    arrays = content["arrays"]
    content["arrays"] = ArrayRecord({"update": arrays["second"], "second": arrays["update"]})


def _retyped(content):
    array = content["arrays"]["update"]
    content["arrays"]["update"] = Array("float64", array.shape, array.stype, array.data)


def _reshaped(content):
    array = content["arrays"]["update"]
    content["arrays"]["update"] = Array(array.dtype, (10**12,), array.stype, array.data)


def _restyled(content):
    array = content["arrays"]["update"]
    content["arrays"]["update"] = Array(array.dtype, array.shape, "pickle", array.data)


def _shortened(content):
    content["arrays"] = ArrayRecord({"update": content["arrays"]["update"]})


def _with(name, record):
    return lambda content: content.update({name: record})


@pytest.mark.parametrize(
    "change",
    [
        _renamed,
        _retyped,
        _reshaped,
        _restyled,
        _shortened,
        _with("arrays", ArrayRecord({"update": Array(np.zeros(5, np.float32))})),
        _with("more", ArrayRecord({"update": Array(np.zeros(5, np.float32))})),
        _with("more", MetricRecord({"loss": 0.5})),
        _with("header", ConfigRecord({"json": HEADER, "more": "x"})),
        _with("header", ConfigRecord({"json": b"bytes"})),
        _with("header", MetricRecord({"json": 1})),
        _with("header", ConfigRecord({"json": HEADER + " "})),
        _with("arrays", MetricRecord({"update": 1.0})),
        _with(SEAL, ConfigRecord({"signature": bytes(64)})),
        _with(SEAL, ConfigRecord({"signature": b"short"})),
        _with(SEAL, ConfigRecord({"signature": "x" * 64})),
        _with(SEAL, ConfigRecord({"signature": bytes(64), "more": 1})),
        _with(SEAL, MetricRecord({"signature": 1})),
        lambda content: content.pop(SEAL),
    ],
)
def test_swapped_arrays_more_records_and_stripped_signatures_are_refused(change):
    content = sealed()
    change(content)
    with pytest.raises(SignatureError):
        check(content)


def test_the_seal_of_one_reply_does_not_fit_another():
    other = sealed(reply('{"status":"refused"}'))
    other[SEAL] = sealed()[SEAL]
    with pytest.raises(SignatureError):
        check(other)
    with pytest.raises(SignatureError):
        check(sealed(), alias="site-1")


def test_what_is_not_text_in_a_header_is_refused_and_not_raised_as_something_else():
    with pytest.raises(SignatureError):
        digests_of(RecordDict({"header": ConfigRecord({"json": "\ud800"})}))


@pytest.mark.parametrize(
    "change",
    [
        {"alias": 3},
        {"alias": "a" * 101},
        {"run": b"run"},
        {"round": -1},
        {"round": True},
        {"round": 1.5},
        {"issued_ms": -1},
        {"issued_ms": 1.5},
        {"expires_ms": True},
        {"expires_ms": 2**53},
        {"certificate": bytes(3000)},
        {"certificate": "text"},
        {"more": 1},
    ],
)
def test_a_requests_seal_has_one_form(change):
    content = reply()
    record = signed_request(content, statement_of(content, "site-0"))
    assert read_seal(record, "request").alias == "site-0"
    record[SEAL] = ConfigRecord({**record[SEAL], **change})
    with pytest.raises(SignatureError):
        read_seal(record, "request")


def test_a_sealed_request_shares_header_and_arrays_with_what_was_sealed():
    content = reply()
    assert signed_request(content, statement_of(content, "site-0"))["arrays"] is content["arrays"]
