"""Pairs of images, and how near their similarity must come, for the tests of ssim on every device."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Of the map: what the contract promises, and half a unit in the last place of the output where that is coarser.
MAP_TOLERANCE = {torch.float32: 1e-4, torch.float16: 6e-4, torch.bfloat16: 4e-3}
# Of the gradient, relative to its largest value.
GRADIENT_TOLERANCE = {torch.float32: 2e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# Around the tile size, one and several tiles each way, and images just as large as the window.
SHAPES = [(2, 3, 16, 17), (1, 1, 11, 11), (1, 2, 70, 150), (1, 1, 13, 300), (1, 1, 140, 13)]


def image_pair(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """An image and a reconstruction of it, in [0, 1]: alike, but not the same."""
    x = torch.rand(shape)
    return x.to(dtype), (x + 0.2 * torch.randn(shape)).clamp(0, 1).to(dtype)


def relative(got: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected magnitude."""
    return float((got.double() - expected).abs().max() / expected.abs().max())
