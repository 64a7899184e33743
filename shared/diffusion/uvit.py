"""The U-ViT of Bao et al. (arXiv 2209.12152) as used for masked diffusion: it runs on the visible patches only.

Every trainable tensor sits in its own leaf module and is used by calling that module: per-sample gradients need it.
Shapes: B batch, K noise draws per image, S sequences of tokens (2 where approximation and details of a wavelet are
apart), V visible patches per draw and sequence, L = K (1 + S V) tokens with the time tokens, P values per patch, D
width.
"""
# ruff: noqa: N803, N806, N816 - shape suffixes, letters of sizes

import math
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from shared.experiment.config import Experiment


class Positions(nn.Module):
    """Learned positional embedding, sole owner of its table; row 0 belongs to the time token.

    The index carries the batch dimension, because each image (and each draw) has its own visible patches.
    """

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, width))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, x_BLD: Tensor, ids_BL: Tensor) -> Tensor:
        """Add row `ids_BL` (long) to each token; the result has the table's dtype, so the residual stream does too."""
        return x_BLD.to(self.weight.dtype) + F.embedding(ids_BL, self.weight)


class Attention(nn.Module):
    """Multi-head self-attention in which tokens of one noise draw see only each other."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.projection = nn.Linear(width, width)

    def forward(self, x_BLD: Tensor, num_draws: int) -> Tensor:
        """(B, L, D) to (B, L, D); L holds `num_draws` groups of equal length, one after the other."""
        batch, length, width = x_BLD.shape
        # Sizes are explicit: -1 cannot be inferred for the empty batches of Poisson sampling.
        shape = (batch * num_draws, length // num_draws, 3, self.num_heads, width // self.num_heads)
        q, k, v = self.qkv(x_BLD).view(shape).permute(2, 0, 3, 1, 4).unbind(0)
        return self.projection(_attend(q, k, v).transpose(1, 2).reshape(batch, length, width))  # type: ignore[no-any-return]


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v; the fused kernel's backward pass in bfloat16 on a CPU is several times slower.

    The fused kernels of GPUs refuse an empty batch (pytorch issue 133780), which Poisson sampling yields.
    """
    if len(q) == 0 or (q.device.type == "cpu" and q.dtype == torch.bfloat16):
        scores = q * (1 / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)
        return scores.softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Mlp(nn.Module):
    """Two linear layers with a GELU between, four times as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """(B, L, D) to (B, L, D)."""
        return self.fc2(F.gelu(self.fc1(x_BLD)))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Pre-norm transformer block; one of the second half also takes the long skip connection."""

    def __init__(self, width: int, num_heads: int, *, has_skip: bool = False) -> None:
        super().__init__()
        self.skip = nn.Linear(2 * width, width) if has_skip else None
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width)

    def forward(self, x_BLD: Tensor, num_draws: int, skip_BLD: Tensor | None = None) -> Tensor:
        """(B, L, D) to (B, L, D); `skip_BLD` is the output of the mirrored block of the first half."""
        if self.skip is not None:
            assert skip_BLD is not None
            x_BLD = self.skip(torch.cat([x_BLD, skip_BLD], -1))
        x_BLD = x_BLD + self.attention(self.norm1(x_BLD), num_draws)
        return x_BLD + self.mlp(self.norm2(x_BLD))  # type: ignore[no-any-return]


class UViT(nn.Module):
    """eps_theta(S x_t, S p, t) of the paper's Eq. 4: a network on patch tokens, their positions and the time.

    Initialised from torch's global generator (truncated normal, deviation 0.02, biases 0): seed it for a fixed start.
    """

    def __init__(
        self, *, in_channels: int, grid_size: int, patch_size: int, width: int, num_blocks: int, num_heads: int,
        sequences: tuple[int, ...] = (),
    ) -> None:  # fmt: skip
        """Build the network; `sequences` are the channels of two sequences of tokens, nothing: one of all channels."""
        super().__init__()
        assert num_blocks % 2 == 1, "blocks come in mirrored pairs around one in the middle"
        assert width % num_heads == 0, "heads share the width equally"
        self.width, self.grid_size = width, grid_size
        self.patch_values = [patch_size**2 * channels for channels in sequences or (in_channels,)]
        self.embedding = nn.Linear(self.patch_values[0], width)
        if len(self.patch_values) > 1:
            self.detail_embedding = nn.Linear(self.patch_values[1], width)
            self.detail_output = nn.Linear(width, self.patch_values[1])
        self.positions = Positions(1 + len(self.patch_values) * grid_size**2, width)
        self.in_blocks = nn.ModuleList(Block(width, num_heads) for _ in range(num_blocks // 2))
        self.mid_block = Block(width, num_heads)
        self.out_blocks = nn.ModuleList(Block(width, num_heads, has_skip=True) for _ in range(num_blocks // 2))
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, self.patch_values[0])
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def add_qkv_bias(self) -> None:
        """Give query, key and value of every attention a bias, which is 0 at first."""
        for module in self.modules():
            if isinstance(module, Attention):
                weight = module.qkv.weight
                module.qkv.bias = nn.Parameter(torch.zeros(len(weight), device=weight.device))

    def start_patches_uniformly(self) -> None:
        """Start the embeddings as torch starts a convolution on P values: U(-1/sqrt(P), 1/sqrt(P)), biases as well."""
        for layer in (self.embedding, *([self.detail_embedding] if len(self.patch_values) > 1 else [])):
            for parameter in layer.parameters():
                nn.init.uniform_(parameter, -(layer.in_features**-0.5), layer.in_features**-0.5)

    def forward(self, tokens_BVP: Tensor, t_B: Tensor, ids_BV: Tensor) -> Tensor:
        """Predict for each visible patch. All arguments positional: per-sample gradient hooks drop keywords.

        Args:
            tokens_BVP: noised patches (B, V, P), or (B, K V, P) with the K draws one after the other. Row k of two
                sequences holds the k-th visible patch of each, the values of the approximation first.
            t_B: 0-based step index, long or fractional, (B,), or (B, K).
            ids_BV: long, row-major index of each patch in the grid, (B, S V), or (B, K S V); in each draw those of the
                approximation, then those of the details.

        Returns:
            The prediction, shape and dtype of `tokens_BVP`.
        """
        batch, num_draws = len(tokens_BVP), t_B.shape[1] if t_B.ndim == 2 else 1
        visible, width, sequences = tokens_BVP.shape[1] // num_draws, self.width, len(self.patch_values)
        length = num_draws * (1 + sequences * visible)

        # One time token in front of the patches of each draw.
        time_BK1D = timestep_embedding(t_B, width).view(batch, num_draws, 1, width)
        values = torch.split(tokens_BVP.to(self.embedding.weight.dtype), self.patch_values, -1)
        parts = [self.embedding(values[0]), *(self.detail_embedding(each) for each in values[1:])]
        patches_BKVD = [part.view(batch, num_draws, visible, width) for part in parts]
        x_BLD = torch.cat([time_BK1D, *patches_BKVD], 2).view(batch, length, width)
        first = torch.arange(sequences, device=ids_BV.device) * self.grid_size**2 + 1
        places = ids_BV.view(batch, num_draws, sequences, visible) + first[:, None]
        rows = F.pad(places.flatten(2), (1, 0)).view(batch, length)
        x_BLD = self.positions(x_BLD, rows)

        skips = []
        for block in self.in_blocks:
            x_BLD = block(x_BLD, num_draws)
            skips.append(x_BLD)
        x_BLD = self.mid_block(x_BLD, num_draws)
        for block in self.out_blocks:
            x_BLD = block(x_BLD, num_draws, skips.pop())

        x_BKLD = x_BLD.view(batch, num_draws, 1 + sequences * visible, width)[:, :, 1:]
        normed = self.norm(x_BKLD.reshape(batch, num_draws * sequences * visible, width))
        if sequences == 1:
            return self.output(normed).to(tokens_BVP.dtype)  # type: ignore[no-any-return]
        halves = normed.view(batch, num_draws, 2, visible, width).transpose(1, 2)
        approximation, detail = halves.reshape(batch, 2, num_draws * visible, width).unbind(1)
        return torch.cat([self.output(approximation), self.detail_output(detail)], -1).to(tokens_BVP.dtype)


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """Cosines, then sines, of t at `width` / 2 frequencies from 1 down to nearly 1/10000; t may be fractional.

    The sinusoids of Vaswani et al. (arXiv 1706.03762, section 3.5) in the order of DDPM's successors.

    Returns:
        float32, shape of t plus a last axis of `width`.
    """
    half = width // 2
    frequencies = torch.exp(-math.log(10_000) / half * torch.arange(half, device=t.device, dtype=torch.float32))
    angles = t.float()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


uvit_T = partial(UViT, width=192, num_blocks=7, num_heads=6)
"""3.4 M parameters, for CPUs and tests."""
uvit_S = partial(UViT, width=512, num_blocks=13, num_heads=8)
"""The paper's MaskDM-S: 44,292,144 parameters at 64 px."""
uvit_B = partial(UViT, width=768, num_blocks=13, num_heads=12)
"""The paper's MaskDM-B: 99,468,336 parameters at 64 px."""
uvit_L = partial(UViT, width=1024, num_blocks=17, num_heads=16)
"""The paper's MaskDM-L: 231,233,584 parameters at 64 px; on 12 x 128 x 128 wavelet bands 232,315,072 in one sequence
of tokens, and in two, as the authors have it, 233,364,672."""
SIZES = {"T": uvit_T, "S": uvit_S, "B": uvit_B, "L": uvit_L}


def build_model(experiment: Experiment) -> nn.Module:
    """The network an experiment names; `forward(tokens_BVP, t_B, ids_BV)` whatever the backbone.

    Raises:
        InputError: backbone unet without diffusers, or with settings it cannot take.
    """
    model, shape = experiment.model, {"in_channels": experiment.in_channels, "grid_size": experiment.grid_size}
    match model.backbone:
        case "uvit":
            network = SIZES[model.size](patch_size=model.patch_size, sequences=experiment.sequences, **shape)
            if model.qkv_bias:
                network.add_qkv_bias()
            if model.patch_init == "uniform":
                network.start_patches_uniformly()
            return network
        case "unet":
            from shared.diffusion.unet import WIDTHS, CoordinateUNet

            return CoordinateUNet(patch_size=model.patch_size, widths=WIDTHS[model.size], **shape)
