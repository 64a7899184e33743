"""The toy distributions of the paper's Figure 2, and a distance of point clouds that sees dependence.

Shapes: B points, N coordinates.
"""
# ruff: noqa: N803 - shape suffixes

import math

import torch
from torch import Tensor

from server.studies.stored_toys import ToyName


def draw(name: ToyName, count: int, stream: torch.Generator) -> Tensor:
    """(count, N) points of a toy."""
    return swiss_roll(count, stream) if name == "swiss-roll" else rose(count, stream)


def swiss_roll(count: int, stream: torch.Generator) -> Tensor:
    """(count, 2) points on one and a half turns of a spiral, within about [-1, 1]."""
    angle = 1.5 * math.pi * (1 + 2 * torch.rand(count, generator=stream))
    points = torch.stack([angle * angle.cos(), angle * angle.sin()], 1) / (4.8 * math.pi)
    return points + 0.01 * torch.randn(count, 2, generator=stream)


def rose(count: int, stream: torch.Generator) -> Tensor:
    """(count, 3) points on the petals of a rose, within about [-1, 1].

    The surface is Paul Nylander's parametric rose (bugman123.com): petals wind up a spiral and open with it.
    """
    along = torch.rand(count, generator=stream).sqrt()
    angle = math.pi * (17 * torch.rand(count, generator=stream) - 2)
    tilt = math.pi / 2 * (-angle / (8 * math.pi)).exp()
    edge = 1 - 0.5 * (1.25 * (1 - (3.6 * angle).remainder(2 * math.pi) / math.pi).square() - 0.25).square()
    bend = 1.95653 * along.square() * (1.27689 * along - 1).square() * tilt.sin()
    radius = edge * (along * tilt.sin() + bend * tilt.cos())
    height = edge * (along * tilt.cos() - bend * tilt.sin())
    return torch.stack([radius * angle.sin(), radius * angle.cos(), 1.3 * height - 0.27], 1)


def without_dependence(points_BN: Tensor, stream: torch.Generator) -> Tensor:
    """(B, N) points with the same marginals and independent coordinates: each coordinate shuffled by itself."""
    columns = [column[torch.randperm(len(column), generator=stream)] for column in points_BN.unbind(1)]
    return torch.stack(columns, 1)


def energy_distance(x_BN: Tensor, y_BN: Tensor) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| of two point clouds (Szekely and Rizzo 2013): 0 for equal distributions only.

    Unbiased: pairs of a point with itself do not count, so two draws of one distribution are 0 on average, and may be
    below.
    """
    between = torch.cdist(x_BN, y_BN).double().mean()
    within = [torch.cdist(each, each).double().sum() / (len(each) * (len(each) - 1)) for each in (x_BN, y_BN)]
    return float(2 * between - within[0] - within[1])
