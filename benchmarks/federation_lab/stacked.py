"""Several U-ViTs of one shape as one network: each matrix product is a batched one, so that small networks fill a core.

`torch.func.vmap` over the product's module gives the same numbers in twice the time here.

Shapes: M networks, B images of each, V patches, P values of a patch, L = 1 + V tokens, D width.
"""
# ruff: noqa: N803, N806 - shape suffixes

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from shared.diffusion.uvit import UViT, timestep_embedding


class StackedUViT:
    """The forward pass of `shared.diffusion.uvit.UViT` on weights with a leading axis of networks."""

    def __init__(self, model: UViT) -> None:
        self.width = model.width
        self.num_heads, self.num_pairs = model.mid_block.attention.num_heads, len(model.in_blocks)

    def __call__(self, weights: Mapping[str, Tensor], tokens_MBVP: Tensor, t_MB: Tensor) -> Tensor:
        """The predictions, (M, B, V, P); every patch is visible, in the grid's order."""
        networks, batch, visible, _ = tokens_MBVP.shape
        rows = (networks, batch, 1 + visible, self.width)
        patches = _linear(weights, "embedding", tokens_MBVP.flatten(1, 2)).view(networks, batch, visible, self.width)
        x_MBLD = torch.cat([timestep_embedding(t_MB, self.width)[:, :, None], patches], 2)
        x = (x_MBLD + weights["positions.weight"][:, None]).flatten(1, 2)
        skips = []
        for number in range(self.num_pairs):
            x = self._block(weights, f"in_blocks.{number}", x, rows)
            skips.append(x)
        x = self._block(weights, "mid_block", x, rows)
        for number in range(self.num_pairs):
            name = f"out_blocks.{number}"
            x = _linear(weights, f"{name}.skip", torch.cat([x, skips.pop()], -1))
            x = self._block(weights, name, x, rows)
        x = x.view(rows)[:, :, 1:].flatten(1, 2)
        return _linear(weights, "output", _norm(weights, "norm", x)).view(tokens_MBVP.shape)

    def _block(self, weights: Mapping[str, Tensor], name: str, x: Tensor, rows: tuple[int, ...]) -> Tensor:
        x = x + self._attention(weights, f"{name}.attention", _norm(weights, f"{name}.norm1", x), rows)
        inner = F.gelu(_linear(weights, f"{name}.mlp.fc1", _norm(weights, f"{name}.norm2", x)))
        return x + _linear(weights, f"{name}.mlp.fc2", inner)

    def _attention(self, weights: Mapping[str, Tensor], name: str, x: Tensor, rows: tuple[int, ...]) -> Tensor:
        networks, batch, length, width = rows
        shape = (networks * batch, length, 3, self.num_heads, width // self.num_heads)
        q, k, v = _linear(weights, f"{name}.qkv", x).view(shape).permute(2, 0, 3, 1, 4).unbind(0)
        scores = q * (1 / math.sqrt(width // self.num_heads)) @ k.transpose(-2, -1)
        seen = (scores.softmax(-1) @ v).transpose(1, 2).reshape(networks, batch * length, width)
        return _linear(weights, f"{name}.projection", seen)


def _linear(weights: Mapping[str, Tensor], name: str, x_MRD: Tensor) -> Tensor:
    matrix, bias = weights[f"{name}.weight"].transpose(1, 2), weights.get(f"{name}.bias")
    return torch.bmm(x_MRD, matrix) if bias is None else torch.baddbmm(bias[:, None], x_MRD, matrix)


def _norm(weights: Mapping[str, Tensor], name: str, x_MRD: Tensor) -> Tensor:
    normed = F.layer_norm(x_MRD, x_MRD.shape[-1:])
    return torch.addcmul(weights[f"{name}.bias"][:, None], normed, weights[f"{name}.weight"][:, None])
