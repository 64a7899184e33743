# ruff: noqa: N803, N806
"""DINOv2's vision transformers (arXiv 2304.07193) from a file of the published weights.

torch-fidelity knows DINOv2 only as code and weights that it fetches from the network and runs. This is the same network
(github.com/facebookresearch/dinov2, Apache-2.0, without register tokens), so that a file with a known digest will do.
Shapes: B images, H W pixels, L tokens, D width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from shared.errors import InputError

PATCH, HEAD_WIDTH, PUBLISHED_GRID = 14, 64, 37
POSITION_OFFSET = 0.1
"""Added to the grid's side before positions are resampled: the published networks were trained so."""


class Published(NamedTuple):
    """One of the published networks."""

    width: int
    depth: int
    filename: str
    sha256: str
    """Of the file at `URL`; Meta publishes none, these are the digests that others have recorded of it, e.g.
    github.com/finegrain-ai/refiners."""

    @property
    def url(self) -> str:
        """Where the file is."""
        return f"https://dl.fbaipublicfiles.com/dinov2/{self.filename}/{self.filename}_pretrain.pth"


NETWORKS = {
    "dinov2-vit-s-14": Published(
        384, 12, "dinov2_vits14", "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9"
    ),
    "dinov2-vit-b-14": Published(
        768, 12, "dinov2_vitb14", "0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73"
    ),
    "dinov2-vit-l-14": Published(
        1024, 24, "dinov2_vitl14", "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428"
    ),
    "dinov2-vit-g-14": Published(
        1536, 40, "dinov2_vitg14", "baf8467e50af277596bbbafa06887c177ee899ab46033649c383577d7e9309d3"
    ),
}


class DinoV2(nn.Module):
    """Pixels, normalised (B, 3, H, W) with sides in multiples of 14, to the class token's features (B, D).

    Args:
        width: D.
        depth: number of blocks.
        is_gated: feed-forward layers are SwiGLU, as in ViT-g.
    """

    def __init__(self, width: int, depth: int, *, is_gated: bool) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, PUBLISHED_GRID**2 + 1, width))
        # Used in training only; part of the file.
        self.mask_token = nn.Parameter(torch.zeros(1, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, PATCH, stride=PATCH)})
        self.blocks = nn.ModuleList(_Block(width, is_gated=is_gated) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Features (B, D)."""
        patches = self.patch_embed["proj"](x_BCHW)
        tokens_BLD = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches.flatten(2).mT], 1)
        tokens_BLD = tokens_BLD + self._positions(patches.shape[-2], patches.shape[-1])
        for block in self.blocks:
            tokens_BLD = block(tokens_BLD)
        # The norm acts on each token alone, and only the first one is wanted.
        features: Tensor = self.norm(tokens_BLD[:, 0])
        return features

    def _positions(self, rows: int, columns: int) -> Tensor:
        """Positions of the published 37 x 37 grid, resampled to this one."""
        if (rows, columns) == (PUBLISHED_GRID, PUBLISHED_GRID):
            return self.pos_embed
        grid = self.pos_embed[:, 1:].reshape(1, PUBLISHED_GRID, PUBLISHED_GRID, -1).permute(0, 3, 1, 2)
        scale = tuple((side + POSITION_OFFSET) / PUBLISHED_GRID for side in (rows, columns))
        resampled = F.interpolate(grid, scale_factor=scale, mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], resampled.flatten(2).mT], 1)


class _Block(nn.Module):
    def __init__(self, width: int, *, is_gated: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = _Attention(width), _Gated(width) if is_gated else _FeedForward(width)
        self.ls1, self.ls2 = _Scale(width), _Scale(width)

    def forward(self, tokens_BLD: Tensor) -> Tensor:
        tokens_BLD = tokens_BLD + self.ls1(self.attn(self.norm1(tokens_BLD)))
        found: Tensor = tokens_BLD + self.ls2(self.mlp(self.norm2(tokens_BLD)))
        return found


class _Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, tokens_BLD: Tensor) -> Tensor:
        query, key, value = self.qkv(tokens_BLD).unflatten(-1, (3, -1, HEAD_WIDTH)).permute(2, 0, 3, 1, 4)
        found: Tensor = self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        return found


class _FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, tokens_BLD: Tensor) -> Tensor:
        found: Tensor = self.fc2(F.gelu(self.fc1(tokens_BLD)))
        return found


class _Gated(nn.Module):
    """SwiGLU; two thirds of four widths, rounded up to a multiple of 8."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = (int(4 * width * 2 / 3) + 7) // 8 * 8
        self.w12, self.w3 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, tokens_BLD: Tensor) -> Tensor:
        gate, value = self.w12(tokens_BLD).chunk(2, -1)
        found: Tensor = self.w3(F.silu(gate) * value)
        return found


class _Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, tokens_BLD: Tensor) -> Tensor:
        return tokens_BLD * self.gamma


def build_dinov2(name: str, tensors: dict[str, Tensor]) -> DinoV2:
    """The network `name` with the tensors of its weights file.

    Raises:
        InputError: the tensors are not those of this network; the line names the first that differs.
    """
    width, depth, _, _ = NETWORKS[name]
    with torch.device("meta"):
        network = DinoV2(width, depth, is_gated=name == "dinov2-vit-g-14")
    own = network.state_dict()
    for key in sorted(own.keys() | tensors.keys()):
        wanted = tuple(own[key].shape) if key in own else "missing"
        given = tuple(tensors[key].shape) if key in tensors else "missing"
        if wanted != given:
            raise InputError(
                f"weights of {name}: tensor {key!r} is {given} in the file, {wanted} in the network; give "
                f"{NETWORKS[name].filename}_pretrain.pth as published"
            )
    network.load_state_dict(tensors, strict=True, assign=True)
    return network
