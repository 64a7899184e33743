# ruff: noqa: N803
"""Feature networks by name: Inception, CLIP and DINOv2 as torch-fidelity feeds them, a random one, ONNX files.

Weights are files with a known digest, given or downloaded once; none is fetched or run before it is checked.
"""

import socket
import urllib.error
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from shared.errors import InputError
from shared.evaluation.dinov2 import NETWORKS as DINOV2
from shared.evaluation.dinov2 import build_dinov2
from shared.evaluation.extractor import Extractor, check_digest, exact_convolutions
from shared.evaluation.feature_statistics import INCEPTION_2015_SHA256, FeatureSpace
from shared.evaluation.onnx_network import ONNX_PREFIX, onnx_extractor
from shared.evaluation.random_inception import random_inception
from shared.paths import given_path

INCEPTION = "inception-v3-compat"
RANDOM_INCEPTION = "random-inception"
INCEPTION_LAYERS = ("64", "192", "768", "2048")

_DOWNLOAD_TIMEOUT_SECONDS = 30.0


class WeightsFile(NamedTuple):
    """The published weights of a network."""

    url: str
    sha256: str
    cached_as: str
    """Name in torch hub's cache: that of torch-fidelity where it keeps the same file."""


def load_extractor(
    spec: str, *, weights: Path | None = None, weights_sha256: str = "", device: torch.device | str = "cpu"
) -> Extractor:
    """The feature network that `spec` names.

    Args:
        spec: `inception-v3-compat` (layer 2048, or `inception-v3-compat:768`), `random-inception`, a CLIP or DINOv2
            name of torch-fidelity (`clip-vit-b-32`, `dinov2-vit-b-14`), or `onnx:FILE`.
        weights: file of the weights; without it the published file is taken from torch hub's cache or downloaded.
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
        return onnx_extractor(Path(given_path(spec.removeprefix(ONNX_PREFIX))), weights_sha256)
    if name == INCEPTION and (layer or "2048") not in INCEPTION_LAYERS:
        raise InputError(f"{INCEPTION} has no layer {layer!r}: give one of {', '.join(INCEPTION_LAYERS)}")
    if name == INCEPTION or (name.startswith(("clip-", "dinov2-")) and not layer):
        return _torch_fidelity(name, layer, weights, weights_sha256, device)
    raise InputError(
        f"extractor {spec!r} is unknown: give {INCEPTION}, {RANDOM_INCEPTION}, {ONNX_PREFIX}FILE, clip-vit-b-32 or "
        "dinov2-vit-b-14"
    )


def _torch_fidelity(
    name: str, layer: str, weights: Path | None, weights_sha256: str, device: torch.device
) -> Extractor:
    """A network with the resizing and scaling of torch-fidelity, from a file whose digest is checked first."""
    fidelity = _fidelity_class(name)
    published = _published(name)
    path = weights or _download(name, published)
    remedy = f"give the file of {published.url}, or name this file's own digest with --weights-sha256"
    digest = check_digest(path, weights_sha256 or published.sha256, remedy)
    layer = layer or fidelity.get_default_feature_layer_for_metric("fid")
    match name.partition("-")[0]:
        case "dinov2":
            network = _dinov2(fidelity, name, layer, build_dinov2(name, _plain_tensors(path)))
        case "clip":
            network = _clip(fidelity, name, layer, path)
        case _:
            # torch-fidelity unpickles this file, which runs any code in it; one that loads as plain tensors has none.
            _plain_tensors(path)
            network = _of_file(fidelity, name, layer, path, "the published weights")
    return _wrap(network, FeatureSpace(name, layer, digest), device)


def _clip(fidelity: Any, name: str, layer: str, path: Path) -> nn.Module:  # noqa: ANN401  # as `_fidelity_class`
    """CLIP's image tower of a TorchScript archive, OpenAI's format."""
    return _of_file(fidelity, name, layer, path, "OpenAI's archive", verbose=False)


def _of_file(
    fidelity: Any,  # noqa: ANN401  # as `_fidelity_class`
    name: str,
    layer: str,
    path: Path,
    what: str,
    **options: bool,
) -> nn.Module:
    """torch-fidelity's network with the weights of a file that fits it.

    Raises:
        InputError: other weights.
    """
    try:
        network: nn.Module = fidelity(name, [layer], feature_extractor_weights_path=str(path), **options)
    except (RuntimeError, LookupError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"weights {path}: not {what} of {name} ({_first_line(error)}): give that file") from error
    return network


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:100]


def _dinov2(fidelity: Any, name: str, layer: str, model: nn.Module) -> nn.Module:  # noqa: ANN401  # as above
    """torch-fidelity's preparation of images in front of our network: its constructor would fetch code to run."""
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

    network: nn.Module = fidelity.__new__(fidelity)
    FeatureExtractorBase.__init__(network, name, [layer])
    network.feature_extractor_internal_dtype = torch.float32  # type: ignore[assignment]  # as its constructor does
    network.model = model
    return network.requires_grad_(False)


def _plain_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that holds nothing else.

    Raises:
        InputError: it holds something else.
    """
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # any failure means the same: no plain weights
        raise InputError(
            f"weights {path}: not a file of plain tensors ({_first_line(error)}): give the published weights file"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise InputError(f"weights {path}: not a dictionary of tensors: give the published weights file")
    return tensors


def _published(name: str) -> WeightsFile:
    from torch_fidelity.feature_extractor_clip import MODEL_METADATA, MODEL_URLS
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    if name in DINOV2:
        return WeightsFile(DINOV2[name].url, DINOV2[name].sha256, f"{DINOV2[name].filename}_pretrain.pth")
    if name in MODEL_URLS:
        digest = MODEL_METADATA[name]["hash"]
        return WeightsFile(MODEL_URLS[name], digest, f"{name}-{digest}.pt")
    return WeightsFile(URL_INCEPTION_V3, INCEPTION_2015_SHA256, URL_INCEPTION_V3.rpartition("/")[2])


def _download(name: str, published: WeightsFile) -> Path:
    """The published file in torch hub's cache, downloaded there on first use."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / published.cached_as
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_DOWNLOAD_TIMEOUT_SECONDS)
    try:
        torch.hub.download_url_to_file(published.url, str(path), published.sha256, progress=False)
    except (OSError, RuntimeError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise InputError(
            f"weights of {name} cannot be downloaded ({reason}): fetch {published.url} elsewhere and give --weights "
            f"FILE, or measure with --extractor {RANDOM_INCEPTION}, which is no FID"
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


def _wrap(network: nn.Module, space: FeatureSpace, device: torch.device) -> Extractor:
    network = network.eval().to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def compute(images_BCHW: Tensor) -> Tensor:
        with exact_convolutions():
            features: Tensor = network(images_BCHW.to(device))[0]
        return features

    width = len(compute(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))[0])
    return Extractor(space, width, compute)
