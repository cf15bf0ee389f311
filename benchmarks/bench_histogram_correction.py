"""histogram_correction beside a full sort and torch.kthvalue, on the image sizes of an inspection line.

Peers compute the same formula in float32: μ = mean of the smallest half, max(error − μ, 0), and its sum.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from harness import (
    Case,
    Provider,
    compiled,
    each_provider,
    eager,
    float64,
    float64_with_gradient,
    ours,
    with_gradient,
)
from torch import Tensor

import memad_fast
from memad_fast.ops.histogram_correction import reference


def sort_form(error: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    images = error.flatten(1)
    count = images.shape[1] // 2
    mu = images.sort(dim=1).values[:, :count].mean(dim=1)
    corrected = (images - mu[:, None]).clamp(min=0.0)
    return corrected.reshape(error.shape), mu, corrected.sum(dim=1)


def kthvalue_form(error: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of what lies below the count-th smallest value, ties filled up with that value."""
    images = error.flatten(1)
    count = images.shape[1] // 2
    threshold = images.kthvalue(count, dim=1, keepdim=True).values
    below = images < threshold
    filled = (count - below.sum(dim=1)) * threshold[:, 0]
    mu = (torch.where(below, images, 0.0).sum(dim=1) + filled) / count
    corrected = (images - mu[:, None]).clamp(min=0.0)
    return corrected.reshape(error.shape), mu, corrected.sum(dim=1)


PROVIDERS = [
    ours(memad_fast.histogram_correction),
    eager("sort", sort_form),
    eager("kthvalue", kthvalue_form),
    compiled("kthvalue", kthvalue_form),
]


def squared_normal(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape).square()


def mostly_zero(shape: tuple[int, ...]) -> Tensor:
    """As thresholded error maps are: no value divides the pixels in halves."""
    return torch.randn(shape).sub(0.5).relu()


def case(
    name: str,
    shape: tuple[int, ...],
    providers: list[Provider],
    expected: Callable,
    passes: int,
    target: float | None = None,
    errors: Callable[[tuple[int, ...]], Tensor] = squared_normal,
) -> Case:
    """``passes``: how often the formula must touch the image, each value read or written once."""
    pixels = torch.Size(shape).numel()
    return Case(
        f"{'x'.join(map(str, shape))} {name}",
        inputs=lambda: (errors(shape),),
        providers=providers,
        expected=expected,
        tolerance=2e-6,
        bytes=passes * 4 * pixels,
        target=target,
    )


CASES = []
for shape in [(20, 128, 128), (16, 512, 512), (8, 1024, 1024)]:
    CASES += [
        case("forward", shape, PROVIDERS, float64(reference), passes=2, target=10.0),
        case(
            "forward+backward",
            shape,
            [with_gradient(provider) for provider in PROVIDERS],
            float64_with_gradient(reference),
            passes=5,
        ),
    ]
CASES.append(case("mostly zero, forward", (16, 512, 512), PROVIDERS, float64(reference), passes=2, errors=mostly_zero))


@each_provider(CASES)
def bench_histogram_correction(measure: Callable, case: Case, provider: Provider) -> None:
    measure(case, provider)
