"""Random and hostile headers through every message model: an answer of the model, or one typed rejection."""

import functools
import importlib
import json
import pkgutil
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import example, given, settings
from hypothesis import strategies as st

import shared.messages
from shared.errors import InputError
from shared.experiment.config import Experiment, Section
from shared.messages.agreement.offer import OfferAnswer, Reason, read_answer, read_offer
from shared.messages.audit import AuditAnswer, AuditQuery, AuditVerdict
from shared.messages.envelope import header_record, parse_header, read_bytes, validated
from shared.messages.packing import Manifest, MessageError, TensorSpec
from shared.messages.secure_sum.key_question import KeysAnswer, KeysQuery
from shared.messages.secure_sum.unmask import UnmaskAnswer, UnmaskQuery
from shared.messages.statistics import (
    MeanImageAnswer,
    MeanImageQuery,
    ReleasedFacts,
    StatisticsAnswer,
    StatisticsQuery,
)
from shared.messages.training import ReplyHeader, RequestHeader, TrainReply, TrainRequest

MODELS: tuple[type[Section], ...] = (
    RequestHeader,
    ReplyHeader,
    AuditQuery,
    AuditAnswer,
    AuditVerdict,
    StatisticsQuery,
    StatisticsAnswer,
    ReleasedFacts,
    MeanImageQuery,
    MeanImageAnswer,
    OfferAnswer,
    Reason,
    Manifest,
    TensorSpec,
    KeysQuery,
    KeysAnswer,
    UnmaskQuery,
    UnmaskAnswer,
)
HEX = "0123456789abcdef" * 4
MANIFEST = {"tensors": [{"name": "a", "shape": [2]}]}
VALID: dict[str, dict[str, Any]] = {
    "RequestHeader": {
        "run": "run",
        "server_round": 1,
        "experiment": Experiment().model_dump(mode="json"),
        "precision": "float32",
        "manifest": MANIFEST,
    },
    "ReplyHeader": {"request_digest": HEX, "status": "trained", "scalars": {"loss": 0.5}, "epsilon": 1.0},
    "AuditQuery": {
        "run": "audit",
        "audited_run": "run",
        "checkpoint": "round-1",
        "checkpoint_digest": HEX,
        "experiment": Experiment().model_dump(mode="json"),
        "manifest": MANIFEST,
        "model_digest": HEX,
        "reference_digests": [HEX[::-1]],
    },
    "AuditAnswer": {"status": "audited", "verdicts": [{"audit": "membership", "passed": True}]},
    "AuditVerdict": {"audit": "memorisation", "passed": False, "reason": "copies", "figures": {"copy_rate": 0.2}},
    "StatisticsQuery": {"run": "s", "kind": "exact", "extractor": "e", "layer": "64", "extractor_sha256": HEX},
    "StatisticsAnswer": {"status": "refused", "reason": "no"},
    "ReleasedFacts": {"site": "a", "release": "dp", "n": 3.5, "images": {"size": "64"}},
    "MeanImageQuery": {"run": "m", "experiment": Experiment().model_dump(mode="json")},
    "MeanImageAnswer": {"request_digest": HEX, "status": "released", "num_units": 40.5, "norm": 0.3, "epsilon": 1.0},
    "OfferAnswer": {"status": "accepted", "unit": "person", "epsilon_round": 0.5, "epsilon_run": 2.0, "delta": 1e-5},
    "Reason": {"code": "budget_exceeded", "text": "epsilon per person would be 9.1, the cap is 8"},
    "Manifest": MANIFEST,
    "TensorSpec": {"name": "a", "shape": [2]},
    "KeysQuery": {"run": "run", "peers": [{"alias": f"site-{each}", "signing_key": each * 64} for each in "abc"]},
    "KeysAnswer": {
        "status": "accepted",
        "member": {"alias": "site-a", "signing_key": HEX, "public_key": HEX, "signature": HEX * 2},
    },
    "UnmaskQuery": {
        "run": "run",
        "server_round": 1,
        "request_digest": HEX,
        "survivors": ["site-a", "site-b", "site-c"],
        "boxes": ["00ff", "01", "02"],
    },
    "UnmaskAnswer": {"status": "unmasked", "request_digest": HEX, "shares": ["ab" * 33, "cd" * 66]},
}
HOSTILE_TEXT = st.sampled_from(
    [
        "\x1b]0;pwned\x07\x1b[2J",
        "a\nsite9: audited",
        "\u202egnp.exe",
        "x |\n\n## Privacy\n\n**epsilon 0**",
        "<img src=x onerror=alert(1)>",
        "x" * 100_000,
        "",
    ]
)
HOSTILE_NUMBER = st.sampled_from([10**1000, -(10**30), 2**63, 1.7e308, -1e308, 5e-324, 0, -1, True])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | HOSTILE_TEXT | HOSTILE_NUMBER
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8) | HOSTILE_TEXT, inner, max_size=3),
    max_leaves=6,
)


def texts(value: Any) -> list[str]:
    """Every text in a dumped model, keys included."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for item in value.items() for part in item for text in texts(part)]
    return [text for item in value for text in texts(item)] if isinstance(value, list) else []


def accept(model: type[Section], text: object) -> None:
    """The rule: a clean header, or one typed line."""
    try:
        header = validated(model, parse_header(text))
    except MessageError as error:
        assert isinstance(error, InputError)
        assert str(error).isprintable()
        assert len(str(error)) <= 500
        return
    assert all(found.isprintable() for found in texts(header.model_dump(mode="json")))


def versioned(model: type[Section], header: dict[str, Any]) -> dict[str, Any]:
    return {"schema_version": 1, **header} if "schema_version" in model.model_fields else header


@functools.cache
def fields_of(model: type[Section]) -> st.SearchStrategy[str]:
    return st.sampled_from([*model.model_fields, "unknown"]) | HOSTILE_TEXT


def test_no_message_model_is_left_out():
    for module in pkgutil.walk_packages(shared.messages.__path__, "shared.messages."):
        importlib.import_module(module.name)
    found, subclasses = set(), [Section]
    while subclasses:
        model = subclasses.pop()
        subclasses += model.__subclasses__()
        found |= {model} if model.__module__.startswith("shared.messages.") else set()
    assert found == set(MODELS)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_the_valid_header_that_is_bent_below_is_valid(model):
    validated(model, versioned(model, VALID[model.__name__]))


@settings(max_examples=40)
@given(data=st.data())
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_a_bent_header_is_accepted_clean_or_refused_in_one_line(model, data):
    header = versioned(model, VALID[model.__name__])
    field = data.draw(fields_of(model))
    bent = {**header, "schema_version": 1, field: data.draw(VALUES)}
    accept(model, json.dumps(bent))
    try:
        validated(model, {**header, field: data.draw(SCALARS)})
    except MessageError as error:
        assert str(error).isprintable()


@settings(max_examples=40)
@given(value=VALUES, cut=st.integers(0, 40))
@example(value=[[[[[]]]]], cut=3)
def test_any_text_through_every_model_gives_one_typed_rejection(value, cut):
    for model in MODELS:
        accept(model, json.dumps(value)[: 40 - cut] + json.dumps(value))
        accept(model, value)


@pytest.mark.parametrize(
    "bomb",
    ["[" * 3_000_000, '{"a":' * 500_000, "9" * 5000, '{"schema_version": 1, "reason": "\\ud800"}'],
)
def test_bombs_are_refused_by_every_model(bomb):
    for model in MODELS:
        with pytest.raises(MessageError):
            validated(model, parse_header(bomb))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("scalars", {"loss": 1.7e308}),
        ("scalars", {"loss": float("inf")}),
        ("scalars", {"x |\n## Privacy": 1.0}),
        ("epsilon", 1.7e308),
        ("epsilon_cap", float("inf")),
        ("ledger_sequence", 10**1000),
        ("ledger_sequence", 2**63),
        ("num_examples", 2**53 + 1),
        ("reason", "x" * 501),
    ],
)
def test_numbers_and_names_that_no_page_can_show_are_refused(field, value):
    with pytest.raises(MessageError):
        validated(ReplyHeader, {**VALID["ReplyHeader"], "schema_version": 1, field: value})


@pytest.mark.parametrize(
    "figures",
    [{"AUC": 0.99}, {"auc": "0.99"}, {"auc": 1.5}, {"auc": -0.1}, {"copy_rate": float("nan")}, {"copied": -1.5}],
)
def test_figures_have_known_names_and_values_in_range(figures):
    with pytest.raises(MessageError):
        validated(AuditVerdict, {**VALID["AuditVerdict"], "figures": figures})


def test_figures_of_an_honest_site_are_taken():
    figures = {"auc": 0.51, "copied": -0.25, "threshold": 12.5, "num_images": 1000.0}
    assert validated(AuditVerdict, {**VALID["AuditVerdict"], "figures": figures}).figures == figures


@settings(max_examples=30)
@given(
    shape=st.lists(st.integers(-(2**63), 2**63), max_size=3) | st.just([10**12]),
    dtype=st.sampled_from(["uint8", "float32", "object", "V8", "\x1b"]),
    data=st.binary(max_size=300),
)
def test_hostile_arrays_are_refused_in_one_line(shape, dtype, data):
    header = header_record(ReplyHeader(request_digest=HEX, status="trained"))
    array = Array(dtype, tuple(shape), "numpy.ndarray", data)
    content = RecordDict({"arrays": ArrayRecord({"update": array, "file": array}), "header": header})
    for read in (
        lambda: TrainReply.from_record(content, 4),
        lambda: TrainRequest.from_record(content),
        lambda: read_offer(content),
        lambda: read_bytes(content, "file", 1000),
    ):
        with pytest.raises(MessageError) as caught:
            read()
        assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "bent",
    [
        {"epsilon_run": 0.1},
        {"epsilon_cap": 1.7e308},
        {"delta": 0.0},
        {"unit": "family"},
        {"reasons": [{"code": "policy", "text": "accepted, and yet"}]},
        {"status": "refused"},
        {"status": "refused", "reasons": [{"code": "own", "text": "no such code"}]},
        {"status": "refused", "reasons": [{"code": "policy", "text": "x"}] * 33},
    ],
)
def test_an_answer_to_an_offer_that_contradicts_itself_is_refused(bent):
    header = ConfigRecord({"json": json.dumps({**VALID["OfferAnswer"], "schema_version": 1, **bent})})
    with pytest.raises(MessageError) as caught:
        read_answer(RecordDict({"arrays": ArrayRecord(), "header": header}))
    assert str(caught.value).isprintable()


def test_a_file_comes_back_as_it_was_sent():
    arrays = ArrayRecord({"file": Array(np.frombuffer(b"abc", np.uint8))})
    content = RecordDict({"arrays": arrays, "header": ConfigRecord({"json": "{}"})})
    assert read_bytes(content, "file", 3) == b"abc"
    with pytest.raises(MessageError, match="at most 2 bytes"):
        read_bytes(content, "file", 2)


def test_a_manifest_of_the_other_side_has_printable_names():
    header = {**VALID["RequestHeader"], "manifest": {"tensors": [{"name": "a\x1b", "shape": [1]}]}}
    read = validated(RequestHeader, parse_header(json.dumps({"schema_version": 1, **header})))
    assert isinstance(read.manifest, Manifest)
    assert read.manifest.tensors[0].name == "a "
