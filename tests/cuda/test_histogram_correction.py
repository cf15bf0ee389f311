"""The CUDA kernels of histogram_correction on the model of CUDA (tests/cuda_model), on images held and swept."""

from __future__ import annotations

import math

import pytest
import torch
from cuda_model.build import Model, at_end_of_page, model, needs_compiler
from torch import Tensor

import memad_fast
from memad_fast.ops.histogram_correction import reference

pytestmark = needs_compiler

SHIM = """
#include "cuda/histogram_correction.cu"

using memad_fast::Dtype;
using memad_fast::cuda::HistogramCorrection;

extern "C" int64_t workspace(int64_t dtype, int64_t images, int64_t pixels) {
  return memad_fast::cuda::histogram_correction_workspace(
      {nullptr, static_cast<Dtype>(dtype), images, pixels, 0, nullptr, nullptr, nullptr});
}

extern "C" int histogram_correction(const void* error, int64_t dtype, int64_t images, int64_t pixels, int64_t count,
                                    void* corrected, float* mu, float* score, void* workspace) {
  return memad_fast::cuda::histogram_correction(
      {error, static_cast<Dtype>(dtype), images, pixels, count, corrected, mu, score}, workspace, nullptr);
}
"""
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
# Compute capability and bytes of shared memory for one block: with little of it, images are swept.
DEVICES = {
    "sm_90": (90, 227 << 10),
    "sm_80": (80, 163 << 10),
    "sm_90 without room": (90, 11 << 10),
    "sm_80 without room": (80, 11 << 10),
}


@pytest.fixture(params=DEVICES)
def kernels(request: pytest.FixtureRequest) -> Model:
    library = model(SHIM)
    capability, shared_bytes = DEVICES[request.param]
    library.set_device(capability, 4, shared_bytes)
    library.set_order("forward")
    return library


def histogram_correction(kernels: Model, error: Tensor, fraction: float) -> tuple[Tensor, Tensor, Tensor]:
    images, pixels = len(error), math.prod(error.shape[1:])
    error = error.clone()  # aligned, as the binding gives it
    corrected = torch.empty_like(error)
    mu, score = torch.empty(images), torch.empty(images)
    dtype = DTYPES[error.dtype]
    workspace = torch.full((kernels.value("workspace", dtype, images, pixels),), 0xFF, dtype=torch.uint8)
    count = math.floor(fraction * pixels)
    kernels.call("histogram_correction", error, dtype, images, pixels, count, corrected, mu, score, workspace)
    return corrected, mu, score


def assert_right(kernels: Model, error: Tensor, fraction: float) -> None:
    """Against the definition in float64, and against the CPU op: only the order of the float64 sums may differ."""
    corrected, mu, score = histogram_correction(kernels, error, fraction)
    expected = reference(error.double(), fraction)
    tolerance = TOLERANCE[error.dtype]
    torch.testing.assert_close(mu.double(), expected[1], rtol=1e-6, atol=1e-30, equal_nan=True)
    torch.testing.assert_close(corrected.double(), expected[0], rtol=tolerance, atol=tolerance, equal_nan=True)
    sums = corrected.double().flatten(1).sum(1).float()
    torch.testing.assert_close(score, sums, rtol=1.2e-7, atol=0, equal_nan=True)
    of_cpu = memad_fast.histogram_correction(error, fraction)
    same = (mu == of_cpu[1]) | (mu.isnan() & of_cpu[1].isnan())
    assert torch.equal(corrected[same].nan_to_num(-1), of_cpu[0][same].nan_to_num(-1))
    torch.testing.assert_close(mu, of_cpu[1], rtol=1.2e-7, atol=0, equal_nan=True)


def images_of(pixels: int) -> Tensor:
    return torch.stack([torch.randn(pixels).square(), torch.randn(pixels), torch.linspace(3, -1, pixels)])


# Around the sizes of the sample of a held image (1,024), of a swept region (4,096) and of a swept image's sample.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pixels", [1, 1025, 9003])
def test_equals_the_definition(kernels: Model, pixels: int, dtype: torch.dtype) -> None:
    error = images_of(pixels).to(dtype)
    for image, fraction in zip(error, (0.03, 0.5, 0.98), strict=True):
        assert_right(kernels, image[None], fraction)
    assert_right(kernels, error[:2], 1 / pixels)


def test_images_of_few_values(kernels: Model) -> None:
    """The values that many pixels share end the search."""
    pixels = 9000
    chance = torch.rand(pixels)
    error = torch.stack(
        [
            torch.full((pixels,), 0.1),
            torch.where(chance < 0.7, 0.0, chance),
            torch.where(chance < 0.45, chance, 1.0),
            torch.where(chance < 0.5, -0.0, 0.0),
            torch.where(chance < 0.5, -2.5, 2.5),
            (chance * 20).floor(),
            torch.randn(pixels).mul(60).round() / 255,
            chance * 1e-42,
            torch.where(chance < 0.6, torch.inf, chance),
            torch.where(chance < 0.6, -torch.inf, chance),
            torch.where(chance < 0.4, torch.inf, -torch.inf),
        ]
    )
    for fraction in (0.45, 0.55):
        assert_right(kernels, error, fraction)


def test_sums_beyond_float32(kernels: Model) -> None:
    error = torch.rand(1, 9000) * 3e38
    _, mu, score = histogram_correction(kernels, error, 0.9)
    assert torch.equal(mu, memad_fast.histogram_correction(error, 0.9)[1])
    assert score.item() == torch.inf


def sampled_places(n: int, size: int) -> Tensor:
    """Where the kernels look first among n > size values (``aim`` in histogram_correction.cu)."""
    index, stretch = torch.arange(size), n // size
    return index * stretch + (((index * 2654435769) % 2**32) * stretch >> 32)


@pytest.mark.parametrize("lie", [-1.0, torch.inf])
def test_a_sample_that_misleads_changes_nothing(kernels: Model, lie: float) -> None:
    error = torch.rand(2, 20_000)
    for image, size in zip(error, (1024, 8192), strict=True):  # held, swept
        image[sampled_places(20_000, size)] = lie
    assert_right(kernels, error, 0.5)


def test_a_sample_wider_than_the_image_changes_nothing(kernels: Model) -> None:
    """Most of the image lies between the values that the sample gives for its median."""
    error = 0.499 + 0.002 * torch.rand(2, 20_000)
    for image, size in zip(error, (1024, 8192), strict=True):
        image[sampled_places(20_000, size)] = torch.linspace(0, 1, size)
    assert_right(kernels, error, 0.5)


def test_nan_stays_in_its_own_image(kernels: Model) -> None:
    error = torch.randn(4, 9000).abs()
    error[1, 7] = torch.nan
    error[2, sampled_places(9000, 1024)[3]] = -torch.nan
    error[2, sampled_places(9000, 8192)[3]] = torch.nan
    for fraction in (0.0, 0.5):
        for result in histogram_correction(kernels, error, fraction):
            assert result[1].isnan().all()
            assert result[2].isnan().all()
        assert_right(kernels, error, fraction)


def test_no_pixels_and_no_images(kernels: Model) -> None:
    for shape in ((0, 4), (2, 0)):
        corrected, mu, score = histogram_correction(kernels, torch.empty(shape), 0.5)
        assert corrected.shape == shape
        assert mu.tolist() == score.tolist() == [0.0] * shape[0]


# One block, clusters of 2 and of 8; images that begin at no multiple of 16 bytes, and (the last) images that do.
@pytest.mark.parametrize(
    ("pixels", "dtype"), [(9001, torch.float32), (40_001, torch.bfloat16), (66_004, torch.float32)]
)
def test_results_do_not_depend_on_the_order_of_threads_or_on_the_batch(
    kernels: Model, pixels: int, dtype: torch.dtype
) -> None:
    error = torch.randn(3, pixels).abs().to(dtype)
    expected = histogram_correction(kernels, error, 0.4)
    for order in ("backward", "random 1"):
        kernels.set_order(order)
        results = [histogram_correction(kernels, part, 0.4) for part in error.split([1, 2])]
        for got, want in zip(zip(*results, strict=True), expected, strict=True):
            assert torch.equal(torch.cat(got), want)
    assert_right(kernels, error[:1], 0.4)


@pytest.mark.parametrize("pixels", [1028, 4100, 4104])  # 4104: in units of 16 bytes
def test_touches_nothing_but_its_tensors(kernels: Model, pixels: int) -> None:
    error = at_end_of_page(torch.randn(2, pixels).half())
    corrected, mu, score = (at_end_of_page(torch.zeros(shape)) for shape in ((2, pixels), (2,), (2,)))
    corrected = at_end_of_page(corrected.half())
    workspace = at_end_of_page(torch.zeros(kernels.value("workspace", 1, 2, pixels), dtype=torch.uint8))
    kernels.call("histogram_correction", error, 1, 2, pixels, pixels // 2, corrected, mu, score, workspace)
    assert torch.equal(mu, memad_fast.histogram_correction(error, 0.5)[1])
