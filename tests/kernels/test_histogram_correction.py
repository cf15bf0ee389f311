"""histogram_correction in Triton's interpreter: the public function, on CPU tensors of a few parts."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor

import memad_fast
from memad_fast import _triton
from memad_fast.kernels import histogram_correction as kernel
from memad_fast.ops.histogram_correction import reference

pytestmark = [
    pytest.mark.skipif(not _triton.serves_cpu_tensors(), reason="Triton serves the GPU here: tests/gpu tests it there"),
    # The interpreter is numpy, which warns of the NaN and infinities that a test is about.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def _triton_backend() -> Iterator[None]:
    with memad_fast.use_backend("triton"):
        yield


@pytest.fixture
def small_parts() -> Iterator[None]:
    """Parts of 64 pixels, read 32 at a time, and their bins and sums 2 at a time."""
    with mock.patch.multiple(kernel, _PART=64, _BLOCK=32, _PARTS_AT_ONCE=2, _SUMS=2):
        yield


def errors(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).abs().to(dtype)


def assert_matches_reference(error: Tensor, fraction: float) -> None:
    corrected, mu, score = memad_fast.histogram_correction(error, fraction)
    expected = reference(error.double(), fraction)
    tolerance = TOLERANCE[error.dtype]
    assert corrected.dtype == error.dtype
    assert corrected.shape == error.shape
    assert corrected.is_contiguous()
    torch.testing.assert_close(mu.double(), expected[1], rtol=1e-6, atol=1e-30, equal_nan=True)
    torch.testing.assert_close(corrected.double(), expected[0], rtol=tolerance, atol=tolerance, equal_nan=True)
    torch.testing.assert_close(
        score.double(), corrected.double().flatten(1).sum(1), rtol=1e-6, atol=1e-30, equal_nan=True
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 11, 13), (1, 5), (2, 64), (2, 1, 1, 1)])
def test_equals_the_float64_definition(small_parts: None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for fraction in (0.0, 0.5, 1.0):
        assert_matches_reference(errors(*shape, dtype=dtype), fraction)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_parts_of_the_real_size(dtype: torch.dtype) -> None:
    """One full part and a bit: its blocks and what is left over."""
    assert_matches_reference(torch.randn(1, 16384 + 100).to(dtype), 0.3)


def tied_images(pixels: int) -> Tensor:
    """Images of few values, as error maps often are, and of extreme ones."""
    chance = torch.rand(pixels)
    return torch.stack(
        [
            torch.zeros(pixels),
            torch.where(chance < 0.7, 0.0, chance),
            torch.where(chance < 0.5, -0.0, 0.0),
            torch.where(chance < 0.5, -2.5, 2.5),
            (chance * 8).floor(),
            chance * 1e-42,
            torch.where(chance < 0.6, torch.inf, chance),
            torch.where(chance < 0.6, -torch.inf, chance),
            torch.where(chance < 0.4, torch.inf, -torch.inf),
            torch.where(chance < 0.5, 1e36, -1e36) * chance,
        ]
    )


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.6, 1.0])
def test_images_of_few_values(small_parts: None, fraction: float) -> None:
    assert_matches_reference(tied_images(70), fraction)


@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.99])
def test_the_threshold_may_differ_from_others_in_its_last_bit(small_parts: None, fraction: float) -> None:
    bits = torch.randperm(1000)[:130].to(torch.int32)
    assert_matches_reference(torch.stack([bits.view(torch.float32), (bits + 0x3F800000).view(torch.float32)]), fraction)


def test_the_cpu_backend_gives_the_same_mu(small_parts: None) -> None:
    error = torch.cat([errors(2, 70), tied_images(70)])
    for fraction in (0.0, 0.3):
        _, mu, _ = memad_fast.histogram_correction(error, fraction)
        with memad_fast.use_backend("cpu"):
            expected = memad_fast.histogram_correction(error, fraction)[1]
        torch.testing.assert_close(mu, expected, rtol=2e-7, atol=0, equal_nan=True)


@pytest.mark.parametrize("nan", [torch.nan, -torch.nan])
@pytest.mark.parametrize("fraction", [0.0, 0.5])
def test_nan_stays_in_its_own_image(small_parts: None, fraction: float, nan: float) -> None:
    error = errors(3, 100)
    error[1, 70] = nan
    corrected, mu, score = memad_fast.histogram_correction(error, fraction)
    assert corrected[1].isnan().all()
    assert mu[1].isnan()
    assert score[1].isnan()
    assert_matches_reference(error[[0, 2]], fraction)


def test_a_nan_with_the_sign_bit_is_a_nan(small_parts: None) -> None:
    error = errors(1, 20)
    error.view(torch.int32)[0, 3] = -1
    assert memad_fast.histogram_correction(error, 0.5)[1].isnan().all()


@pytest.mark.parametrize("shape", [(0, 4, 4), (2, 0), (0,)])
def test_empty_input_gives_empty_results(shape: tuple[int, ...]) -> None:
    error = torch.empty(shape, requires_grad=True)
    corrected, mu, score = memad_fast.histogram_correction(error, 0.5)
    assert corrected.shape == shape
    assert mu.tolist() == score.tolist() == [0.0] * shape[0]
    assert torch.autograd.grad(score.sum(), error)[0].shape == shape


def test_strided_and_expanded_inputs_give_the_same(small_parts: None) -> None:
    error = errors(2, 6, 10)
    for view in (error.transpose(1, 2), error[::2, :, ::3], error[:1].expand(2, 6, 10), error[:, 2:4]):
        for got, expected in zip(
            memad_fast.histogram_correction(view, 0.5),
            memad_fast.histogram_correction(view.contiguous(), 0.5),
            strict=True,
        ):
            assert torch.equal(got, expected)


def forward_and_gradient(error: Tensor) -> list[Tensor]:
    error = error.detach().requires_grad_()
    corrected, mu, score = memad_fast.histogram_correction(error, 0.5)
    (grad,) = torch.autograd.grad((corrected * error.detach()).sum() + mu.sum() - score.sum(), error)
    return [corrected.detach(), mu.detach(), score.detach(), grad]


def test_results_do_not_depend_on_the_batch(small_parts: None) -> None:
    error = errors(2, 150)
    each = [forward_and_gradient(row[None]) for row in error]
    for got, expected in zip(forward_and_gradient(error), zip(*each, strict=True), strict=True):
        assert torch.equal(got, torch.cat(expected))


def assert_gradient_matches_reference(error: Tensor, fraction: float) -> None:
    grads = [torch.randn(error.shape), torch.randn(len(error)), torch.randn(len(error))]
    results = []
    for x, call in ((error.clone(), memad_fast.histogram_correction), (error.double(), reference)):
        x.requires_grad_()
        outputs = call(x, fraction)
        total = sum((out.double() * g.double()).sum() for out, g in zip(outputs, grads, strict=True))
        results.append(torch.autograd.grad(total, x)[0].double())
    tolerance = 3 * TOLERANCE[error.dtype]
    torch.testing.assert_close(results[0], results[1], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gradient_equals_the_references(small_parts: None, dtype: torch.dtype) -> None:
    error = errors(1, 7, 13, dtype=dtype)
    error[:, 0] = error[:, 1]  # ties
    for fraction in (0.0, 0.4, 1.0):
        assert_gradient_matches_reference(error, fraction)


@pytest.mark.parametrize("fraction", [0.0, 0.5])
def test_gradient_of_images_of_few_values(small_parts: None, fraction: float) -> None:
    """Where the error equals mu exactly (all zero, say), corrected passes no gradient."""
    assert_gradient_matches_reference(tied_images(70)[:4], fraction)


def test_expanded_gradients_are_read_in_place(small_parts: None) -> None:
    results = []
    for grad in (torch.tensor(2.0).expand(2, 100), torch.full((2, 100), 2.0)):
        error = torch.linspace(0, 1, 200).reshape(2, 100).requires_grad_()
        corrected, _, score = memad_fast.histogram_correction(error, 0.5)
        results.append(torch.autograd.grad((corrected, score), error, (grad, torch.ones(2).sum().expand(2)))[0])
    assert torch.equal(*results)


def test_gradient_of_an_image_with_nan_is_nan(small_parts: None) -> None:
    error = errors(2, 100)
    error[1, 3] = torch.nan
    error.requires_grad_()
    memad_fast.histogram_correction(error, 0.5)[2].sum().backward()
    assert error.grad is not None
    assert error.grad[0].isfinite().all()
    assert error.grad[1].isnan().all()


def test_opcheck(small_parts: None) -> None:
    error = errors(1, 3, 5).requires_grad_()
    torch.library.opcheck(torch.ops.memad_fast.histogram_correction.default, (error, 0.5))
