# ruff: noqa: N803
"""An evaluator's own feature network from an ONNX file: uint8 (N, 3, H, W) or (N, H, W, 3) in, float32 (N, D) out.

The file is data for onnxruntime; nothing in it runs as Python. Its digest has to cover everything that is executed, so
a file whose weights lie in other files is refused. Field numbers are those of ONNX's onnx.proto3.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared.errors import InputError
from shared.evaluation.extractor import Extractor, check_digest
from shared.evaluation.feature_statistics import FeatureSpace

ONNX_PREFIX = "onnx:"
_CHANNELS = 3
_MAX_DEPTH = 100
# For each message, the fields that lead to tensors, and what they hold.
_FIELDS: Mapping[str, Mapping[int, str]] = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
_TENSOR_NAME, _EXTERNAL_DATA, _DATA_LOCATION = 8, 13, 14


def onnx_extractor(path: Path, sha256: str = "") -> Extractor:
    """The network of `path`, named after the file.

    Raises:
        InputError: onnxruntime or the file is missing, another digest than `sha256`, weights in other files, other
            input or output types.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise InputError("onnx extractors need onnxruntime: `pip install 'maskfed[onnx]'`") from error
    digest = check_digest(path, sha256, "give the file that this digest belongs to")
    data = path.read_bytes()
    _refuse_external_data(data, path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise InputError(f"{path}: not a readable ONNX file ({_one_line(error)})") from error
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1 or inputs[0].type != "tensor(uint8)" or len(inputs[0].shape) != 4:
        given = ", ".join(f"{one.name} {one.type} {one.shape}" for one in inputs)
        raise InputError(f"{path}: takes {given}: an extractor takes one input, uint8 (N, 3, H, W) or (N, H, W, 3)")
    shape = inputs[0].shape
    is_channels_last = shape[3] == _CHANNELS and shape[1] != _CHANNELS
    if isinstance(channels := shape[3 if is_channels_last else 1], int) and channels != _CHANNELS:
        raise InputError(f"{path}: takes images {shape}: an extractor takes colours, (N, 3, H, W) or (N, H, W, 3)")
    output = _features(outputs, path)
    width = int(output.shape[1])

    def compute(images_BCHW: Tensor) -> Tensor:
        images = (images_BCHW.permute(0, 2, 3, 1) if is_channels_last else images_BCHW).cpu().contiguous()
        _check_shape(path, shape[1:], tuple(images.shape[1:]))
        batch = shape[0] if isinstance(shape[0], int) and shape[0] > 0 else len(images)
        parts = [_run(session, part, output.name, batch, path) for part in torch.split(images, batch)]
        if any(part.shape[1:] != (width,) for part in parts):
            raise InputError(f"{path}: gives features {tuple(parts[0].shape)}, not (N, {width}) as it says")
        return torch.cat(parts)

    return Extractor(FeatureSpace(f"{ONNX_PREFIX}{path.stem}", "", digest), width, compute)


def _features(outputs: list[Any], path: Path) -> Any:  # noqa: ANN401  # onnxruntime's classes are untyped
    """The one output that is float32 (N, D).

    Raises:
        InputError: none is, or several are: which of them a distance means nobody has said.
    """
    fitting = [
        each
        for each in outputs
        if each.type == "tensor(float)" and len(each.shape) == 2 and isinstance(each.shape[1], int)
    ]
    if len(fitting) == 1:
        return fitting[0]
    given = ", ".join(f"{one.name} {one.type} {one.shape}" for one in fitting or outputs)
    raise InputError(f"{path}: gives {given}: an extractor gives float32 (N, D) once, save it with one such output")


def _run(session: Any, images: Tensor, output: str, batch: int, path: Path) -> Tensor:  # noqa: ANN401  # untyped class
    """Features of at most `batch` images; a network of a fixed batch sees the last ones filled up with zeros.

    Raises:
        InputError: it cannot take them, gives another number of rows, or numbers that are not finite.
    """
    count = len(images)
    filled = torch.cat([images, images.new_zeros(batch - count, *images.shape[1:])]) if count < batch else images
    try:
        result = session.run([output], {session.get_inputs()[0].name: filled.numpy()})
    except Exception as error:  # as above
        raise InputError(f"{path}: cannot take images of shape {tuple(images.shape)} ({_one_line(error)})") from error
    if len(result[0]) != batch:
        raise InputError(f"{path}: gives {len(result[0])} rows for {batch} images: give a network with one for each")
    features = torch.from_numpy(result[0])[:count]
    if not bool(torch.isfinite(features).all()):
        raise InputError(f"{path}: gives features that are not finite: give another network")
    return features


def _check_shape(path: Path, wanted: list[int | str], found: tuple[int, ...]) -> None:
    if any(isinstance(one, int) and one != other for one, other in zip(wanted, found, strict=True)):
        shown = " x ".join(map(str, wanted))
        raise InputError(
            f"{path}: takes images of {shown}, these are {' x '.join(map(str, found))}: give a network for them"
        )


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else f"{text[:200]} ..."


def _refuse_external_data(data: bytes, path: Path) -> None:
    """Refuse a file that has onnxruntime read others, which its digest does not cover.

    Raises:
        InputError: naming the first such tensor and its file; or the file is no ONNX.
    """
    if data[4:8] == b"ORTM":
        raise InputError(f"{path}: is in ONNX Runtime's own format: give the ONNX file that it was made from")
    try:
        for name, place in _external(memoryview(data), "model", 0):
            raise InputError(
                f"{path}: tensor {name!r} lies in another file ({place!r}), which the digest does not cover: save the "
                "network as one file (onnx.save_model(..., save_as_external_data=False))"
            )
    except (IndexError, RecursionError) as error:
        raise InputError(f"{path}: not a readable ONNX file (its structure is damaged)") from error


def _external(data: memoryview, kind: str, depth: int) -> Iterator[tuple[str, str]]:
    """Name and file of every tensor below a message that lies outside of the file."""
    if depth > _MAX_DEPTH:
        raise RecursionError
    fields = list(_fields(data))
    if kind == "tensor":
        values = dict(fields)
        if _EXTERNAL_DATA in values or values.get(_DATA_LOCATION) == 1:
            entries = [dict(_fields(value)) for number, value in fields if number == _EXTERNAL_DATA]
            place = next((_text(each.get(2)) for each in entries if _text(each.get(1)) == "location"), "")
            yield _text(values.get(_TENSOR_NAME)), place
        return
    for number, value in fields:
        inner = _FIELDS[kind].get(number)
        if inner is not None and isinstance(value, memoryview):
            yield from _external(value, inner, depth + 1)


def _text(value: "memoryview | int | None") -> str:
    return bytes(value[:200]).decode("utf-8", "replace") if isinstance(value, memoryview) else ""


def _fields(data: "memoryview | int") -> Iterator[tuple[int, "memoryview | int"]]:
    """Fields of a protobuf message, numbers and contents.

    Raises:
        IndexError: it ends in the middle of a field, or holds what protobuf does not.
    """
    if isinstance(data, int):
        raise IndexError
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        match key & 7:
            case 0:
                value, place = _varint(data, place)
                yield key >> 3, value
            case 2:
                length, place = _varint(data, place)
                if place + length > len(data):
                    raise IndexError
                yield key >> 3, data[place : place + length]
                place += length
            case 1 | 5 as width:
                place += 8 if width == 1 else 4
            case _:
                raise IndexError


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
    raise IndexError
