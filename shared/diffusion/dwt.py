# ruff: noqa: N803, N806
"""One level of a two-dimensional orthogonal wavelet transform, in torch on the tensor's device.

Filters come from PyWavelets; the boundary is periodic (its mode `periodization`), so that an even side halves exactly
and the transform is orthogonal: white noise stays white, and a distance in bands is the distance in pixels times the
scale.

Scale. Every band is multiplied by 1 / (sum |h|)^2, h the low-pass filter: then images in [-1, 1] cannot leave [-1, 1]
in any band, the range that networks train in and samplers clip x_0 to. For `haar` the factor is 1/2: the approximation
band is the mean of each 2 x 2 square, the three detail bands are half differences of means. One factor for all bands
keeps the transform orthogonal up to that factor.

Band order: approximation, horizontal, vertical and diagonal detail (cA, cH, cV, cD of `pywt.dwt2`), each with all C
channels.

Shapes: B images, C channels, H W pixels; bands are (B, 4 C, H / 2, W / 2).
"""

import torch
from torch import Tensor

from shared.errors import InputError
from shared.experiment.sections import DataConfig
from shared.experiment.wavelet_filters import Filters, filters


def to_network(x_BCHW: Tensor, data: DataConfig) -> Tensor:
    """Float images in [-1, 1] as the network sees them: the images, their bands, or bands in the authors' ranges.

    Theirs is 2 cA - 1 of an image in [0, 1] with the orthonormal transform: 2 a + 1 of the `dwt`'s approximation a, in
    [-1, 3]; details are the same numbers (github.com/jiachenlei/maskdm at 60d132b, gaussian_ddpm.py).
    """
    bands_BCHW = dwt(x_BCHW, data.wavelet) if data.wavelet else x_BCHW
    if data.wavelet_tokens == "joint":
        return bands_BCHW
    return torch.cat([2 * bands_BCHW[:, :3] + 1, bands_BCHW[:, 3:]], 1)


def from_network(x_BCHW: Tensor, data: DataConfig) -> Tensor:
    """The inverse of `to_network`."""
    if data.wavelet_tokens == "split":
        x_BCHW = torch.cat([(x_BCHW[:, :3] - 1) / 2, x_BCHW[:, 3:]], 1)
    return idwt(x_BCHW, data.wavelet) if data.wavelet else x_BCHW


def highest(data: DataConfig) -> Tensor:
    """(C, 1, 1) or (1, 1, 1): the largest value of each channel of the network's input; the least is -1 always."""
    return torch.tensor([3.0] * 3 + [1.0] * 9 if data.wavelet_tokens == "split" else [1.0])[:, None, None]


def dwt(x_BCHW: Tensor, wavelet: str) -> Tensor:
    """Scaled bands of images: the network's input where `data.wavelet` is set and `wavelet_tokens` is `joint`.

    Args:
        x_BCHW: (B, C, H, W) float images in [-1, 1], H and W even.
        wavelet: name of an orthogonal wavelet of PyWavelets.

    Returns:
        (B, 4 C, H / 2, W / 2) in [-1, 1].

    Raises:
        InputError: unknown or not orthogonal wavelet, odd side.
    """
    bank = filters(wavelet)
    height, width = x_BCHW.shape[-2:]
    if height % 2 or width % 2:
        raise InputError(f"images of {height} x {width} have an odd side: a wavelet halves them, give even sides")
    if len(bank.low) == 2:
        return haar(x_BCHW)
    low, high = _analyse(x_BCHW, bank, axis=2)
    (approximation, vertical), (horizontal, diagonal) = _analyse(low, bank, axis=3), _analyse(high, bank, axis=3)
    return torch.cat([approximation, horizontal, vertical, diagonal], dim=1) * bank.scale


def idwt(bands_BCHW: Tensor, wavelet: str) -> Tensor:
    """Inverse of `dwt`: what turns a sampled x_0 back into images.

    Args:
        bands_BCHW: (B, 4 C, H / 2, W / 2) scaled bands.
        wavelet: the one given to `dwt`.

    Returns:
        (B, C, H, W); in [-1, 1] up to what the bands contradict each other.

    Raises:
        InputError: unknown or not orthogonal wavelet.
    """
    bank = filters(wavelet)
    if len(bank.low) == 2:
        return inverse_haar(bands_BCHW)
    approximation, horizontal, vertical, diagonal = (bands_BCHW / bank.scale).chunk(4, dim=1)
    low = _synthesise(approximation, vertical, bank, axis=3)
    high = _synthesise(horizontal, diagonal, bank, axis=3)
    return _synthesise(low, high, bank, axis=2)


def haar(x_BCHW: Tensor) -> Tensor:
    """`dwt` for `haar`, by slices: no filters, nothing to look up, so it compiles to one kernel.

    Rows are paired first, where memory is contiguous; a mean by `lerp` and a difference from it carry the scale, so
    that no pass over memory is spent on scaling. On a CPU that is what the time goes into.
    """
    upper, lower = x_BCHW[..., ::2, :], x_BCHW[..., 1::2, :]
    mean = torch.lerp(upper, lower, 0.5)
    step = mean - lower
    approximation = torch.lerp(mean[..., ::2], mean[..., 1::2], 0.5)
    horizontal = torch.lerp(step[..., ::2], step[..., 1::2], 0.5)
    vertical, diagonal = approximation - mean[..., 1::2], horizontal - step[..., 1::2]
    return torch.cat([approximation, horizontal, vertical, diagonal], dim=1)


def inverse_haar(bands_BCHW: Tensor) -> Tensor:
    """`idwt` for `haar`, by slices."""
    approximation, horizontal, vertical, diagonal = bands_BCHW.chunk(4, dim=1)
    top, bottom = approximation + horizontal, approximation - horizontal
    top_step, bottom_step = vertical + diagonal, vertical - diagonal
    rows = [
        torch.stack(pair, dim=-1).flatten(-2)
        for pair in ((top + top_step, top - top_step), (bottom + bottom_step, bottom - bottom_step))
    ]
    return torch.stack(rows, dim=-2).flatten(-3, -2)


def _analyse(x: Tensor, bank: Filters, axis: int) -> tuple[Tensor, Tensor]:
    """Low and high half of one axis: c[i] = sum_k h[k] x[2 i + L / 2 - k], indices modulo the length."""
    halves = (*x.shape[:axis], x.shape[axis] // 2, 2, *x.shape[axis + 1 :])
    phases = x.reshape(halves).unbind(axis + 1)
    low = high = torch.zeros((), dtype=x.dtype, device=x.device)
    for tap, (h, g) in enumerate(zip(*bank, strict=True)):
        shift, phase = divmod(len(bank.low) // 2 - tap, 2)
        rolled = phases[phase].roll(-shift, axis)
        low, high = low + h * rolled, high + g * rolled
    return low, high


def _synthesise(low: Tensor, high: Tensor, bank: Filters, axis: int) -> Tensor:
    """The transpose of `_analyse`, which is its inverse because the wavelet is orthogonal."""
    phases = [torch.zeros((), dtype=low.dtype, device=low.device)] * 2
    for tap, (h, g) in enumerate(zip(*bank, strict=True)):
        shift, phase = divmod(len(bank.low) // 2 - tap, 2)
        phases[phase] = phases[phase] + (h * low + g * high).roll(shift, axis)
    return torch.stack(phases, dim=axis + 1).flatten(axis, axis + 1)
