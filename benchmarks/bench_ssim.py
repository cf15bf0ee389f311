"""ssim_loss beside pytorch-msssim, torchmetrics, kornia, and the plain torch formula, eager and compiled.

All compute the loss of "valid" 11 × 11 windows, sigma 1.5, in float32. The targets are PERFORMANCE's 4 times the best
peer for forward and backward. 20 x 1 x 128 x 128 is PMB's training batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from harness import Case, Provider, compiled, each_provider, eager, float64, float64_with_gradient, ours, with_gradient
from torch import Tensor

import memad_fast
from memad_fast.ops.ssim import reference

TAPS = 11


def plain(x: Tensor, y: Tensor) -> Tensor:
    """The formula as most repositories write it: five images through one grouped convolution each."""
    channels = x.shape[1]
    distance = torch.arange(TAPS, dtype=x.dtype, device=x.device) - TAPS // 2
    taps = torch.exp(-(distance**2) / (2 * 1.5**2))
    taps = (taps / taps.sum()).expand(channels, 1, TAPS)

    def mean(image: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(image, taps[:, :, None], groups=channels), taps[:, :, :, None], groups=channels)

    mean_x, mean_y = mean(x), mean(y)
    variance_x, variance_y = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2
    covariance = mean(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + 1e-4) / (mean_x**2 + mean_y**2 + 1e-4)
    return 1 - (luminance * (2 * covariance + 9e-4) / (variance_x + variance_y + 9e-4)).mean()


def msssim(x: Tensor, y: Tensor) -> Tensor:
    import pytorch_msssim

    return 1 - pytorch_msssim.ssim(x, y, data_range=1.0)


def torchmetrics(x: Tensor, y: Tensor) -> Tensor:
    from torchmetrics.functional.image import structural_similarity_index_measure

    return 1 - structural_similarity_index_measure(x, y, data_range=1.0)


def kornia(x: Tensor, y: Tensor) -> Tensor:
    from kornia.metrics import ssim

    return 1 - ssim(x, y, TAPS, padding="valid").mean()


def fused(x: Tensor, y: Tensor) -> Tensor:
    from fused_ssim import fused_ssim

    return 1 - fused_ssim(x, y, padding="valid")


PROVIDERS = [
    ours(memad_fast.ssim_loss),
    eager("plain torch", plain),
    compiled("plain torch", plain),
    eager("pytorch-msssim", msssim, requires="pytorch_msssim"),
    eager("torchmetrics", torchmetrics, requires="torchmetrics"),
    eager("kornia", kornia, requires="kornia"),
    *([eager("fused-ssim", fused, requires="fused_ssim")] if torch.cuda.is_available() else []),
]


def image_pair(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    x = torch.rand(shape)
    return x, (x + 0.2 * torch.randn(shape)).clamp(0, 1)


def definition(x: Tensor, y: Tensor) -> Tensor:
    return (1 - reference(x, y)).mean()


def cases(shape: tuple[int, ...]) -> list[Case]:
    """Forward, and forward and backward, of images of one shape."""
    name, pixels = "x".join(map(str, shape)), torch.Size(shape).numel()
    # A pixel takes 4 filtered values of 2 x 11 multiply-adds forward; backward does that twice more. Bytes: both images
    # once, and in backward both images again and both gradients.
    return [
        Case(
            f"{name} forward",
            inputs=lambda: image_pair(shape),
            providers=PROVIDERS,
            expected=float64(definition),
            tolerance=1e-5,
            flops=2 * 4 * 2 * TAPS * pixels,
            bytes=8 * pixels,
            target=4.0,
        ),
        Case(
            f"{name} forward+backward",
            inputs=lambda: image_pair(shape),
            providers=[with_gradient(provider) for provider in PROVIDERS],
            expected=float64_with_gradient(definition),
            tolerance=1e-4,
            flops=3 * 2 * 4 * 2 * TAPS * pixels,
            bytes=24 * pixels,
            target=4.0,
        ),
    ]


CASES = [case for shape in [(20, 1, 128, 128), (16, 3, 256, 256), (8, 3, 512, 512)] for case in cases(shape)]


@each_provider(CASES)
def bench_ssim_loss(measure: Callable, case: Case, provider: Provider) -> None:
    measure(case, provider)
