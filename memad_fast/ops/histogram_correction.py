"""Histogram error estimation (PMB, section III-C, eq. 6): subtract the error that a reconstruction makes everywhere.

μ_b = mean of the ⌊fraction·n⌋ smallest values of image b;  corrected = max(error − μ_b, 0);  score_b = Σ corrected.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from memad_fast._arguments import check_fraction
from memad_fast._backend import serves_reference
from memad_fast._checks import check_float
from memad_fast._library import call, define


def histogram_correction(error: Tensor, fraction: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    """Estimate each image's everyday error from its smallest values and subtract it.

    Args:
        error: ``[B, ...]`` error maps, any number of dimensions after the first, any strides. float32, float16,
            bfloat16, or float64 (by the reference).
        fraction: share δ_H of each image's n values that estimate μ, in [0, 1]. The count is ⌊fraction·n⌋;
            0 switches the estimate off (μ = 0).

    Returns:
        ``corrected``, like ``error``: max(error − μ, 0).
        ``mu`` ``[B]`` float32 (float64 for float64): the exact mean of the smallest values, summed in float64.
        ``score`` ``[B]`` like ``mu``: Σ corrected over each image, summed in float64.

    An image with a NaN gives NaN for all three; other images are not touched by it. Infinities follow the formula.

    Gradients: for ``error``, through corrected, mu and score. Every selected value carries 1/count of μ's gradient;
    values equal to the largest selected one share the rest equally, so the order of ties does not matter. Where the
    error equals μ, corrected passes no gradient. An image with a NaN gets NaN.

    Cost: O(n) time, no sort; no memory but the outputs and 56 bytes for each 16,384 pixels (1.1 KiB by Triton). The
    results are the same for any batch split, number of threads and instruction set.

    Raises:
        TypeError: ``error`` is not a floating tensor.
        ValueError: ``error`` has no batch dimension, or ``fraction`` lies outside [0, 1].

    Source: P. Xing, Z. Li, "Visual Anomaly Detection via Partition Memory Bank Module and Error Estimation",
    section III-C, eq. 6.

    Example:
        >>> import torch, memad_fast
        >>> error = torch.tensor([[1.0, 1.0, 2.0, 5.0]])
        >>> corrected, mu, score = memad_fast.histogram_correction(error, fraction=0.5)
        >>> corrected.tolist(), mu.tolist(), score.tolist()
        ([[0.0, 0.0, 1.0, 4.0]], [1.0], [5.0])
    """
    check_float("error", error)
    if error.dim() < 1:
        raise ValueError("error: expected at least 1 dimension [B, ...], got a 0-dimensional tensor")
    check_fraction(fraction)
    if serves_reference("histogram_correction", error):
        return reference(error, fraction)
    return call(torch.ops.memad_fast.histogram_correction, error, fraction)


def reference(error: Tensor, fraction: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, in plain torch: sort, mean, subtract. Sums in float64."""
    images = error.flatten(1) if error.dim() > 1 else error[:, None]
    count = math.floor(fraction * images.shape[1])
    result = torch.float64 if error.dtype == torch.float64 else torch.float32
    wide = images.double()
    mu = _mean_of_smallest(wide, count).to(result)
    corrected = (images.to(result) - mu[:, None]).relu().to(error.dtype)
    score = corrected.double().sum(dim=1).to(result)
    return corrected.reshape(error.shape), mu, score


def _mean_of_smallest(values: Tensor, count: int) -> Tensor:
    """Mean of the ``count`` smallest of each row; NaN for a row with a NaN. The gradient shares ties equally."""
    fixed = values.detach()
    has_nan = fixed.isnan().any(dim=1)
    if count == 0:
        return torch.where(has_nan, torch.nan, fixed.new_zeros(fixed.shape[0]))
    smallest = fixed.sort(dim=1).values[:, :count]
    threshold = smallest[:, -1:]
    below = fixed < threshold
    equal = fixed == threshold
    tie_share = (count - below.sum(dim=1, keepdim=True)) / equal.sum(dim=1, keepdim=True).clamp(min=1)
    weights = torch.where(below, 1.0, torch.where(equal, tie_share, 0.0)) / count
    linear = torch.where((weights > 0) & fixed.isfinite(), values * weights, 0.0).sum(dim=1)
    return torch.where(has_nan, torch.nan, smallest.mean(dim=1)) + (linear - linear.detach())


def _fake(error: Tensor, fraction: float) -> tuple[Tensor, Tensor, Tensor]:
    corrected = torch.empty_like(error, memory_format=torch.contiguous_format)
    mu = error.new_empty(error.shape[0], dtype=torch.float32)
    return corrected, mu, torch.empty_like(mu)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    error, ctx.fraction = inputs
    ctx.save_for_backward(error, output[1])


def _backward(ctx: Any, grad_corrected: Tensor, grad_mu: Tensor, grad_score: Tensor) -> tuple[Tensor, None]:
    error, mu = ctx.saved_tensors
    grad = torch.ops.memad_fast.histogram_correction_backward(
        grad_corrected, grad_mu, grad_score, error, mu, ctx.fraction
    )
    return grad, None


define(
    "histogram_correction(Tensor error, float fraction) -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
define(
    "histogram_correction_backward(Tensor grad_corrected, Tensor grad_mu, Tensor grad_score, Tensor error, Tensor mu,"
    " float fraction) -> Tensor",
    fake=lambda grad_corrected, grad_mu, grad_score, error, mu, fraction: torch.empty_like(
        error, memory_format=torch.contiguous_format
    ),
)
