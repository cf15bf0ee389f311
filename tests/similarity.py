"""SSIM by hand, for the tests of the models that train on it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def ssim_by_hand(x: Tensor, y: Tensor, data_range: float = 1.0) -> Tensor:
    """Mean SSIM over every pixel, 11×11 Gaussian window of σ 1.5, reflected borders, in float64."""
    x, y = x.double(), y.double()
    channels = x.shape[1]
    line = torch.exp(-((torch.arange(11, dtype=torch.float64) - 5) ** 2) / (2 * 1.5**2))
    window = torch.outer(line, line)
    window = (window / window.sum()).expand(channels, 1, 11, 11)

    def blur(values: Tensor) -> Tensor:
        return functional.conv2d(functional.pad(values, (5, 5, 5, 5), mode="reflect"), window, groups=channels)

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    cov = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * cov + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return similarity.mean()
