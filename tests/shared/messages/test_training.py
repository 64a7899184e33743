"""Messages: what goes in comes out, and what does not follow the protocol is named and refused."""

import json

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from shared.experiment.config import Experiment, parse_experiment
from shared.messages.packing import Manifest, MessageError, array_digest, decode, encode, pack, unpack
from shared.messages.training import ReplyHeader, RequestHeader, TrainReply, TrainRequest, experiment_digest

TENSORS = {
    "b.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a.bias": np.array([-1.5, 2.5], np.float32),
    "scalar": np.array(7, np.float32),
}
MANIFEST = Manifest.of(TENSORS)


def request(experiment: Experiment | None = None, base: np.ndarray | None = None) -> TrainRequest:
    frozen = {} if base is None else {"base_digest": array_digest(base), "base_manifest": Manifest.of({"f": base})}
    header = RequestHeader(
        run="run-1",
        server_round=3,
        experiment=experiment or Experiment(),
        precision="float32",
        manifest=MANIFEST,
        **frozen,
    )
    return TrainRequest(header, pack(TENSORS, MANIFEST), base)


def with_header(record: RecordDict, **changes: object) -> RecordDict:
    header = json.loads(record.config_records["header"]["json"])
    header.update(changes)
    record["header"] = ConfigRecord({"json": json.dumps(header)})
    return record


def test_packing_then_unpacking_gives_every_tensor_back():
    restored = unpack(pack(TENSORS, MANIFEST), MANIFEST)
    assert restored.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        np.testing.assert_array_equal(restored[name], tensor)


def test_packing_refuses_a_missing_and_a_misshapen_tensor():
    with pytest.raises(MessageError, match=r"a\.bias is missing"):
        pack({name: tensor for name, tensor in TENSORS.items() if name != "a.bias"}, MANIFEST)
    with pytest.raises(MessageError, match=r"b\.weight has shape \(3, 2\)"):
        pack({**TENSORS, "b.weight": np.zeros((3, 2), np.float32)}, MANIFEST)


@given(st.lists(st.floats(width=32), max_size=20))
def test_bfloat16_wire_rounds_as_torch_does(values: list[float]):
    flat = np.array(values, np.float32)
    reference = torch.from_numpy(flat).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(decode(encode(flat, "bfloat16"), "bfloat16"), reference)


def test_bfloat16_halves_the_bytes_and_keeps_nan_visible():
    flat = np.array([np.nan, 1.0, -np.inf], np.float32)
    wire = encode(flat, "bfloat16")
    assert wire.nbytes * 2 == flat.nbytes
    assert np.isnan(decode(wire, "bfloat16")[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_request_survives_the_wire(dtype: str):
    sent = request(parse_experiment(f'[federation]\nwire_dtype = "{dtype}"'))
    received = TrainRequest.from_record(sent.to_record())
    assert received.header == sent.header
    np.testing.assert_array_equal(received.weights, sent.weights)  # the test values are exact in bfloat16
    assert received.digest == sent.digest


def test_frozen_tensors_travel_in_float32_and_are_checked_by_digest():
    base = np.array([0.1, 0.2], np.float32)
    record = request(base=base).to_record()
    np.testing.assert_array_equal(TrainRequest.from_record(record).base, base)
    record["arrays"]["base"] = Array(base + 1)
    with pytest.raises(MessageError, match="digest"):
        TrainRequest.from_record(record)


def test_the_digest_changes_with_round_weights_and_experiment():
    first = request()
    other = request(parse_experiment("[optim]\nlr = 0.5"))
    moved = TrainRequest(first.header, first.weights + 1)
    later = TrainRequest(first.header.model_copy(update={"server_round": 4}), first.weights)
    assert len({first.digest, other.digest, moved.digest, later.digest}) == 4
    assert first.digest == request().digest


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schema_version": 2}, "schema 2"),
        ({"surprise": 1}, "unknown key 'surprise'"),
        ({"server_round": 0}, "server_round"),
        ({"run": "../../etc"}, "run"),
        ({"manifest": {"tensors": [{"name": "x", "shape": [-1]}]}}, "shape"),
        ({"manifest": {"tensors": [{"name": "x", "shape": [2**20, 2**20]}]}}, "elements"),
        ({"experiment": {"train": {"stepz": 1}}}, "stepz"),
    ],
)
def test_a_request_that_breaks_the_protocol_is_refused_by_name(changes: dict[str, object], said: str):
    with pytest.raises(MessageError, match=said):
        TrainRequest.from_record(with_header(request().to_record(), **changes))


@pytest.mark.parametrize(
    "array",
    [
        Array(np.zeros(3, np.float32)),
        Array(np.zeros(9, np.float64)),
        Array(np.zeros((9, 1), np.float32)),
        Array("float32", (9,), "numpy.ndarray", b"garbage"),
        Array("float32", (9,), "numpy.ndarray", b"x" * 100_000),
    ],
)
def test_arrays_of_another_length_dtype_or_content_are_refused(array: Array):
    record = request().to_record()
    record["arrays"] = ArrayRecord({"weights": array})
    with pytest.raises(MessageError, match="array"):
        TrainRequest.from_record(record)


def test_a_message_without_header_or_weights_is_refused():
    with pytest.raises(MessageError, match="header"):
        TrainRequest.from_record(RecordDict({}))
    record = request().to_record()
    record["arrays"] = ArrayRecord()
    with pytest.raises(MessageError, match="'weights'"):
        TrainRequest.from_record(record)


def test_a_reply_survives_the_wire_and_is_popped_from_the_message():
    header = ReplyHeader(request_digest="0" * 64, status="trained", num_examples=5, scalars={"loss": 0.5})
    record = TrainReply(header, np.ones(9, np.float32)).to_record()
    reply = TrainReply.from_record(record, 9)
    assert reply.header == header
    np.testing.assert_array_equal(reply.update, np.ones(9, np.float32))
    assert not record.array_records["arrays"]


def test_a_refusal_carries_its_code_and_no_update():
    header = ReplyHeader(request_digest="0" * 64, status="refused", refusal="dp_required", reason="policy")
    reply = TrainReply.from_record(TrainReply(header).to_record(), 9)
    assert reply.header.refusal == "dp_required"
    assert reply.update is None


@pytest.mark.parametrize(
    "fields",
    [
        {"status": "refused"},
        {"status": "trained", "refusal": "clock"},
        {"status": "trained", "scalars": {"loss": float("nan")}},
        {"status": "trained", "epsilon": float("nan")},
        {"status": "trained", "epsilon": float("inf")},
        {"status": "trained", "epsilon": -1.0},
    ],
)
def test_a_reply_that_contradicts_itself_cannot_be_made(fields: dict[str, object]):
    with pytest.raises(ValueError, match=r"refusal|finite|greater"):
        ReplyHeader(request_digest="0" * 64, **fields)


def test_the_experiment_digest_sees_every_field():
    assert experiment_digest(Experiment()) != experiment_digest(parse_experiment("[privacy]\nnoise_multiplier = 1.5"))


def test_bfloat16_ties_go_to_the_even_neighbour():
    # bfloat16 has 7 bits behind the point: halfway between two of them, as 1 + 2^-8, the even one wins.
    flat = np.array([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1 + 5 * 2**-8], np.float32)
    expected = np.array([1.0, 1 + 2**-6, -1.0, 1 + 2**-6], np.float32)
    np.testing.assert_array_equal(decode(encode(flat, "bfloat16"), "bfloat16"), expected)


def test_no_nan_is_rounded_into_a_number():
    flat = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7FC00000], np.uint32).view(np.float32)
    assert np.isnan(decode(encode(flat, "bfloat16"), "bfloat16")).all()
