# ruff: noqa: N803
"""An evaluator's own feature network from an ONNX file: uint8 (N, 3, H, W) in, float32 (N, D) out.

The file is data for onnxruntime; nothing in it runs as Python.
"""

from pathlib import Path

import torch
from torch import Tensor

from shared.errors import InputError
from shared.evaluation.extractor import Extractor, check_digest
from shared.evaluation.feature_statistics import FeatureSpace

ONNX_PREFIX = "onnx:"


def onnx_extractor(path: Path, sha256: str = "") -> Extractor:
    """The network of `path`, named after the file.

    Raises:
        InputError: onnxruntime or the file is missing, another digest than `sha256`, other input or output types.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise InputError("onnx extractors need onnxruntime: install the extra `onnx`") from error
    digest = check_digest(path, sha256, "give the file that this digest belongs to")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise InputError(f"{path}: not a readable ONNX file ({str(error).splitlines()[0][:120]})") from error
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1 or inputs[0].type != "tensor(uint8)" or len(inputs[0].shape) != 4:
        given = ", ".join(f"{one.name} {one.type} {one.shape}" for one in inputs)
        raise InputError(f"{path}: takes {given}: an extractor takes one input, uint8 (N, 3, H, W)")
    if outputs[0].type != "tensor(float)" or len(outputs[0].shape) != 2 or not isinstance(outputs[0].shape[1], int):
        raise InputError(f"{path}: gives {outputs[0].type} {outputs[0].shape}: an extractor gives float32 (N, D)")

    def compute(images_BCHW: Tensor) -> Tensor:
        try:
            result = session.run([outputs[0].name], {inputs[0].name: images_BCHW.cpu().numpy()})
        except Exception as error:  # as above
            raise InputError(f"{path}: cannot take images of shape {tuple(images_BCHW.shape)} ({error})") from error
        return torch.from_numpy(result[0])

    return Extractor(FeatureSpace(f"{ONNX_PREFIX}{path.stem}", "", digest), int(outputs[0].shape[1]), compute)
