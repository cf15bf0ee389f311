"""Structural similarity (Wang et al. 2004; PMB eq. 8, 9; SimSID eq. 4, 5): the SSIM of every window, and its loss.

SSIM = (2 μ_x μ_y + C1)(2 σ_xy + C2) / ((μ_x² + μ_y² + C1)(σ_x² + σ_y² + C2)), means and (population) variances weighted
by a Gaussian window, C1 = (0.01 L)², C2 = (0.03 L)², L the range of the data.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from memad_fast._arguments import check_ssim_window
from memad_fast._backend import serves_reference
from memad_fast._checks import check_float, check_like, check_rank
from memad_fast._library import call, define


def ssim_loss(
    x: Tensor,
    y: Tensor,
    *,
    window_size: int = 11,
    sigma: float = 1.5,
    data_range: float = 1.0,
    padding: str = "valid",
) -> Tensor:
    """How unlike two batches of images are: the mean of 1 − SSIM over all windows of all channels.

    Args:
        x, y: ``[B, C, H, W]``, of one shape, dtype and device. float32, float16, bfloat16, or float64 (by the
            reference). Read in place where the last dimension is contiguous.
        window_size: odd; the window is window_size × window_size pixels.
        sigma: standard deviation of the Gaussian, in pixels.
        data_range: L, the distance between the lowest and the highest value an image can have (1, 2 or 255).
        padding: "valid", windows that lie inside the image, or "same", one window per pixel with borders reflected.

    Returns:
        A scalar in [0, 2], float32 (float64 for float64), summed in float64 and the same for any number of threads.
        Exactly 0 for identical images. NaN if a pixel is NaN or infinite, or if there is no image.

    Gradients: for x and y, recomputed from the images: nothing else is kept for the backward pass.

    Cost: O(B·C·H·W·window_size) time; memory 0.2 MiB a thread forward and 0.5 MiB backward, beside the gradients; on a
    GPU at most 8 bytes for 256 windows; the triton backend takes 16 bytes a window in backward, for as many images as
    fit 256 MiB (one at least). The cuda backend takes windows beyond 33 in O(B·C·H·W·window_size²), with that memory.

    Raises:
        TypeError: x or y is no floating tensor, or their dtypes differ.
        ValueError: a rank, shape, device or option is wrong, or a window does not fit the image ("valid": window_size
            pixels each way; "same": more than window_size // 2).

    Source: Z. Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity", IEEE TIP 2004,
    eq. 13 to 16; as a loss in P. Xing, Z. Li, "Visual Anomaly Detection via Partition Memory Bank Module and Error
    Estimation", eq. 8 and 9.

    Example:
        >>> import torch, memad_fast
        >>> image = torch.rand(2, 3, 32, 32)
        >>> memad_fast.ssim_loss(image, image).item()
        0.0
        >>> bool(memad_fast.ssim_loss(image, 1 - image) > 1)  # anti-correlated
        True
    """
    _check(x, y, window_size, sigma, data_range, padding)
    if serves_reference("ssim_loss", x):
        exact = reference(x.double(), y.double(), window_size, sigma, data_range, padding)
        return (1 - exact).mean().to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    return call(torch.ops.memad_fast.ssim_loss, x, y, window_size, sigma, data_range, padding == "same")


def ssim_map(
    x: Tensor,
    y: Tensor,
    *,
    window_size: int = 11,
    sigma: float = 1.5,
    data_range: float = 1.0,
    padding: str = "valid",
) -> Tensor:
    """The SSIM of every window, per channel: how alike two batches of images are, place by place.

    Args: as of :func:`ssim_loss`.

    Returns:
        ``[B, C, H′, W′]`` of the dtype of x, in [−1, 1]: H′ = H − window_size + 1 for "valid", H for "same". Exactly 1
        where the images are identical. Within 1e-4 of the float64 value for float32 images in [0, L]; a constant
        offset of both images does not add to that error. A NaN or infinite pixel gives NaN in the windows that see it.

    Gradients, cost, errors and source: as of :func:`ssim_loss`.

    Example:
        >>> import torch, memad_fast
        >>> x, y = torch.rand(2, 1, 1, 16, 20)
        >>> memad_fast.ssim_map(x, y).shape, memad_fast.ssim_map(x, y, padding="same").shape
        (torch.Size([1, 1, 6, 10]), torch.Size([1, 1, 16, 20]))
    """
    _check(x, y, window_size, sigma, data_range, padding)
    if serves_reference("ssim_map", x):
        return reference(x, y, window_size, sigma, data_range, padding)
    return call(torch.ops.memad_fast.ssim_map, x, y, window_size, sigma, data_range, padding == "same")


def _check(x: Tensor, y: Tensor, window_size: int, sigma: float, data_range: float, padding: str) -> None:
    check_float("x", x)
    check_float("y", y)
    check_rank("x", x, 4, "[B, C, H, W]")
    if y.shape != x.shape:
        raise ValueError(f"y: expected shape {tuple(x.shape)} like x, got {tuple(y.shape)}")
    check_like("y", y, "x", x)
    check_ssim_window(x.shape, window_size, sigma, data_range, padding)


def reference(
    x: Tensor,
    y: Tensor,
    window_size: int = 11,
    sigma: float = 1.5,
    data_range: float = 1.0,
    padding: str = "valid",
) -> Tensor:
    """The definition, in plain torch, computed in float64: five filtered images, then the formula."""
    margin = window_size // 2 if padding == "same" else 0
    window = _gaussian(window_size, sigma, x.device)

    def mean(values: Tensor) -> Tensor:
        planes = values.flatten(0, 1)[:, None]
        filtered = F.conv2d(F.conv2d(planes, window[..., None, :]), window[..., None])
        return filtered.reshape(*values.shape[:2], *filtered.shape[2:])

    wide_x, wide_y = (
        F.pad(image.double(), (margin,) * 4, mode="reflect") if margin else image.double() for image in (x, y)
    )
    mean_x, mean_y = mean(wide_x), mean(wide_y)
    variance_x = mean(wide_x * wide_x) - mean_x * mean_x
    variance_y = mean(wide_y * wide_y) - mean_y * mean_y
    covariance = mean(wide_x * wide_y) - mean_x * mean_y
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x * mean_x + mean_y * mean_y + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).to(x.dtype)


def _gaussian(window_size: int, sigma: float, device: torch.device) -> Tensor:
    """The normalised window in one dimension, [1, 1, window_size] in float64."""
    distance = torch.arange(window_size, dtype=torch.float64, device=device) - window_size // 2
    window = torch.exp(-0.5 * (distance / sigma) ** 2)
    return (window / window.sum()).reshape(1, 1, window_size)


def _fake_map(x: Tensor, y: Tensor, window_size: int, sigma: float, data_range: float, reflect: bool) -> Tensor:
    margin = 0 if reflect else window_size - 1
    return x.new_empty(x.shape[0], x.shape[1], x.shape[2] - margin, x.shape[3] - margin)


def _fake_loss(x: Tensor, y: Tensor, window_size: int, sigma: float, data_range: float, reflect: bool) -> Tensor:
    return x.new_empty((), dtype=torch.float32)


def _fake_gradients(grad: Tensor, x: Tensor, y: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), y.new_empty(y.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, y, *ctx.options = inputs
    ctx.save_for_backward(x, y)


def _map_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*torch.ops.memad_fast.ssim_map_backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None, None)


def _loss_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*torch.ops.memad_fast.ssim_loss_backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None, None)


_INPUTS = "Tensor x, Tensor y, int window_size, float sigma, float data_range, bool reflect"

define(f"ssim_map({_INPUTS}) -> Tensor", fake=_fake_map, setup_context=_setup_context, backward=_map_backward)
define(f"ssim_loss({_INPUTS}) -> Tensor", fake=_fake_loss, setup_context=_setup_context, backward=_loss_backward)
define(f"ssim_map_backward(Tensor grad, {_INPUTS}) -> (Tensor, Tensor)", fake=_fake_gradients)
define(f"ssim_loss_backward(Tensor grad, {_INPUTS}) -> (Tensor, Tensor)", fake=_fake_gradients)
