"""The layer that our networks are made of: C_width, a 3 × 3 convolution with BatchNorm and ReLU."""

from __future__ import annotations

from torch import nn


def convolution(source: int, width: int) -> list[nn.Module]:
    """C_width: from ``source`` channels to ``width``, the size stays."""
    return [nn.Conv2d(source, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]


def convolutions(source: int, width: int) -> nn.Sequential:
    """C_width C_width."""
    return nn.Sequential(*convolution(source, width), *convolution(width, width))
