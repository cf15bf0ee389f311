"""histogram_correction on the GPU: the float64 definition, on images of every kind; mu of the CPU."""

from __future__ import annotations

import pytest
import torch
from carried import on
from error_maps import assert_gradient_matches_reference, assert_matches_reference, errors, tied_images
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from where import DEVICE, DTYPES, each_backend, sized

import memad_fast

forward = each_backend("histogram_correction")
with_gradients = each_backend("histogram_correction", "histogram_correction_backward")
correction = on(DEVICE, memad_fast.histogram_correction)

FRACTIONS = (0.0, 0.1, 0.44, 0.5, 0.56, 0.9, 1.0)
many = settings(max_examples=sized(400, 20), deadline=None, suppress_health_check=list(HealthCheck))


@forward
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 1, 17, 19), (1, 5), (2, 5000), (4, 3, 1, 1), (300, 40)])
def test_equals_the_float64_definition(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for fraction in FRACTIONS:
        assert_matches_reference(errors(*shape, dtype=dtype), fraction, DEVICE)


# Around blocks, clusters of blocks and what they can keep on chip: 227 KiB a block, sixteen blocks.
@forward
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "pixels",
    sized(
        [1, 2, 15, 31, 33, 1023, 1025, 4097, 16383, 16385, 57_000, 58_113, 116_225, 464_897, 929_793, 2_000_003],
        [1, 33, 1025],
    ),
)
def test_any_number_of_pixels(backend: str, pixels: int, dtype: torch.dtype) -> None:
    error = torch.stack([torch.randn(pixels).square(), torch.randn(pixels), torch.linspace(3, -1, pixels)]).to(dtype)
    for fraction in (0.0, 1 / pixels, 0.03, 0.5, 0.98, 1.0):
        assert_matches_reference(error, fraction, DEVICE)


@forward
@pytest.mark.parametrize("pixels", sized([40, 5000, 70_000, 1_000_000], [40]))
def test_images_of_few_values(backend: str, pixels: int) -> None:
    error = tied_images(pixels)
    for fraction in FRACTIONS:
        assert_matches_reference(error, fraction, DEVICE)


@forward
def test_mu_is_the_cpus(backend: str) -> None:
    """Both sum in float64 and round once: in other orders, so the last bit may differ, but not more."""
    error = errors(sized(64, 3), sized(65_536, 500))
    for fraction in (0.1, 0.5):
        got = correction(error, fraction)[1]
        with memad_fast.use_backend("cpu"):
            expected = memad_fast.histogram_correction(error, fraction)[1]
        torch.testing.assert_close(got, expected, rtol=2.0**-23, atol=0)


@forward
@many
@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=80),
    fraction=st.floats(0, 1),
)
def test_the_mean_is_exact_for_any_floats(backend: str, values: list[float], fraction: float) -> None:
    error = torch.tensor([values])
    mu = correction(error, fraction)[1]
    count = int(fraction * len(values))
    expected = error.double()[0].sort().values[:count].mean().item() if count else 0.0
    assert abs(mu.item() - expected) <= 1e-6 * abs(expected) + 1e-12 * error.abs().max().item() + 1e-44


@forward
def test_nan_and_infinity(backend: str) -> None:
    error = errors(3, sized(70_000, 40))
    error[1, 7] = torch.nan
    corrected, mu, score = correction(error, 0.5)
    assert corrected[1].isnan().all()
    assert mu[1].isnan()
    assert score[1].isnan()
    assert_matches_reference(error[[0, 2]], 0.5, DEVICE)
    corrected, mu, score = correction(torch.tensor([[1.0, 2.0, torch.inf, 3.0]]), 0.5)
    assert (corrected.tolist(), mu.tolist(), score.tolist()) == ([[0.0, 0.5, torch.inf, 1.5]], [1.5], [torch.inf])


@forward
@pytest.mark.parametrize("shape", [(0, 4, 4), (2, 0), (0,)])
def test_empty_input_gives_empty_results(backend: str, shape: tuple[int, ...]) -> None:
    corrected, mu, score = correction(torch.empty(shape), 0.5)
    assert corrected.shape == shape
    assert mu.tolist() == score.tolist() == [0.0] * shape[0]


@with_gradients
@pytest.mark.parametrize("dtype", DTYPES)
def test_views_and_parts_of_a_batch_give_the_same_bits(backend: str, dtype: torch.dtype) -> None:
    error = errors(4, 60, sized(300, 20), dtype=dtype).to(DEVICE)

    def everything(image: torch.Tensor) -> list[torch.Tensor]:
        leaf = image.detach().requires_grad_()
        outputs = memad_fast.histogram_correction(leaf, 0.5)
        total = (outputs[0].float() * image.float()).sum() + outputs[1].sum() - outputs[2].sum()
        return [*(output.detach() for output in outputs), torch.autograd.grad(total, leaf)[0]]

    for view in (error, error.transpose(1, 2), error[::2, :, ::3], error[:1].expand(5, -1, -1), error[..., 1:]):
        whole = everything(view)
        for got, expected in zip(everything(view.contiguous()), whole, strict=True):
            assert torch.equal(got, expected)
        parts = [everything(view[n : n + 1]) for n in range(len(view))]
        for index, expected in enumerate(whole):
            assert torch.equal(torch.cat([part[index] for part in parts]), expected)


@with_gradients
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", sized([(3, 7, 11), (3, 130, 150), (2, 1_000_003)], [(3, 7, 11)]))
def test_gradient_equals_the_references(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    error = errors(*shape, dtype=dtype)
    error[:, 0] = error[:, 1]  # ties
    for fraction in (0.0, 0.4, 1.0):
        assert_gradient_matches_reference(error, fraction, DEVICE)


@with_gradients
def test_gradient_of_images_of_few_values(backend: str) -> None:
    error = tied_images(sized(20_000, 60))[:7]
    for fraction in (0.0, 0.25, 0.5):
        assert_gradient_matches_reference(error, fraction, DEVICE)


@with_gradients
def test_gradient_of_an_image_with_nan_is_nan(backend: str) -> None:
    error = errors(2, 2000)
    error[1, 3] = torch.nan
    error = error.to(DEVICE).requires_grad_()
    memad_fast.histogram_correction(error, 0.5)[2].sum().backward()
    assert error.grad is not None
    assert error.grad[0].isfinite().all()
    assert error.grad[1].isnan().all()
