# ruff: noqa: N803
"""Feature networks by name: torch-fidelity's Inception, CLIP and DINOv2, a random one for offline use, ONNX files."""

import hashlib
import socket
import urllib.error
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shared.errors import InputError
from shared.extractor import Extractor, check_digest, exact_convolutions
from shared.onnxnet import ONNX_PREFIX, onnx_extractor
from shared.randomnet import random_inception
from shared.statistics import INCEPTION_2015_SHA256, FeatureSpace

INCEPTION = "inception-v3-compat"
RANDOM_INCEPTION = "random-inception"
INCEPTION_LAYERS = ("64", "192", "768", "2048")

_DOWNLOAD_TIMEOUT_SECONDS = 30.0


def load_extractor(
    spec: str, *, weights: Path | None = None, weights_sha256: str = "", device: torch.device | str = "cpu"
) -> Extractor:
    """The feature network that `spec` names.

    Args:
        spec: `inception-v3-compat` (layer 2048, or `inception-v3-compat:768`), `random-inception`, a CLIP or DINOv2
            name of torch-fidelity (`clip-vit-b-32`, `dinov2-vit-b-14`), or `onnx:FILE`.
        weights: file of the weights; without it torch-fidelity's own copy is used or downloaded.
        weights_sha256: the digest that `weights` must have, where it is not the published file.
        device: where PyTorch networks run; ONNX files run on the CPU.

    Raises:
        InputError: unknown name, file missing or with another digest, or no weights and no way to get them.
    """
    device = torch.device(device)
    name, _, layer = spec.partition(":")
    if spec == RANDOM_INCEPTION:
        return random_inception(device)
    if spec.startswith(ONNX_PREFIX):
        return onnx_extractor(Path(spec.removeprefix(ONNX_PREFIX)), weights_sha256)
    if name == INCEPTION:
        return _inception(layer or "2048", weights, weights_sha256, device)
    if name.startswith(("clip-", "dinov2-")) and not layer:
        return _torch_fidelity(name, weights, weights_sha256, device)
    raise InputError(
        f"extractor {spec!r} is unknown: give {INCEPTION}, {RANDOM_INCEPTION}, {ONNX_PREFIX}FILE, clip-vit-b-32 or "
        "dinov2-vit-b-14"
    )


def _inception(layer: str, weights: Path | None, weights_sha256: str, device: torch.device) -> Extractor:
    if layer not in INCEPTION_LAYERS:
        raise InputError(f"{INCEPTION} has no layer {layer!r}: give one of {', '.join(INCEPTION_LAYERS)}")
    path = weights or _download_inception()
    remedy = "give the Inception-2015 file of torch-fidelity, or name this file's own digest with --weights-sha256"
    digest = check_digest(path, weights_sha256 or INCEPTION_2015_SHA256, remedy)
    _load_safely(path)
    fidelity = _fidelity_class(INCEPTION)
    network = fidelity(INCEPTION, [layer], feature_extractor_weights_path=str(path))
    return _wrap(network, FeatureSpace(INCEPTION, layer, digest), device)


def _load_safely(path: Path) -> None:
    """torch-fidelity unpickles its file, which runs any code in it; a file that loads as plain tensors has none."""
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # any failure means the same: no plain weights
        first = str(error).splitlines()[0][:100]
        raise InputError(
            f"weights {path}: not a file of plain tensors ({first}): give torch-fidelity's file"
        ) from error


def _download_inception() -> Path:
    """torch-fidelity's file in torch hub's cache, downloaded there on first use."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3 as URL

    path: Path = Path(torch.hub.get_dir()) / "checkpoints" / URL.rpartition("/")[2]
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_DOWNLOAD_TIMEOUT_SECONDS)
    try:
        torch.hub.download_url_to_file(URL, str(path), INCEPTION_2015_SHA256, progress=False)
    except (OSError, RuntimeError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise InputError(
            f"Inception weights cannot be downloaded ({reason}): fetch {URL} elsewhere and give --weights FILE, "
            f"or measure with --extractor {RANDOM_INCEPTION}, which is no FID"
        ) from error
    finally:
        socket.setdefaulttimeout(before)
    return path


def _fidelity_class(name: str) -> Any:  # noqa: ANN401  # an untyped class of torch-fidelity
    try:
        from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
    except (ImportError, RuntimeError) as error:
        raise InputError(
            f"extractor {name!r} needs torch-fidelity and a torchvision that matches torch ({error}): install them, "
            f"or take {RANDOM_INCEPTION} or {ONNX_PREFIX}FILE"
        ) from error
    if name not in FEATURE_EXTRACTORS_REGISTRY:
        known = sorted(key for key in FEATURE_EXTRACTORS_REGISTRY if key.startswith(("clip", "dinov2")))
        raise InputError(f"extractor {name!r} is unknown to torch-fidelity: give one of {', '.join(known)}")
    return FEATURE_EXTRACTORS_REGISTRY[name]


def _torch_fidelity(name: str, weights: Path | None, weights_sha256: str, device: torch.device) -> Extractor:
    """CLIP or DINOv2 as torch-fidelity builds them; CLIP weights are checked against OpenAI's published digest."""
    fidelity = _fidelity_class(name)
    layer = fidelity.get_default_feature_layer_for_metric("fid")
    options: dict[str, object] = {"verbose": False}
    digest = ""
    if weights is not None:
        if name.startswith("dinov2-"):
            raise InputError(
                f"extractor {name!r} has no reader for weight files in torch-fidelity: leave out --weights"
            )
        from torch_fidelity.feature_extractor_clip import MODEL_METADATA

        remedy = (
            f"give OpenAI's {MODEL_METADATA[name]['filename']}.pt, or name this file's digest with --weights-sha256"
        )
        digest = check_digest(weights, weights_sha256 or MODEL_METADATA[name]["hash"], remedy)
        options["feature_extractor_weights_path"] = str(weights)
    try:
        network = fidelity(name, [layer], **options)
    except (OSError, RuntimeError) as error:
        first = str(error).splitlines()[0][:160]
        raise InputError(
            f"weights of {name} cannot be had ({first}): check the network connection or --weights"
        ) from error
    return _wrap(network, FeatureSpace(name, layer, digest or state_digest(network)), device)


def state_digest(network: nn.Module) -> str:
    """SHA-256 over the names and bytes of all tensors of a network, for weights that come from no single file."""
    hasher = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        hasher.update(name.encode())
        hasher.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()


def _wrap(network: nn.Module, space: FeatureSpace, device: torch.device) -> Extractor:
    network = network.eval().to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def compute(images_BCHW: Tensor) -> Tensor:
        with exact_convolutions():
            features: Tensor = network(images_BCHW.to(device))[0]
        return features

    width = len(compute(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))[0])
    return Extractor(space, width, compute)
