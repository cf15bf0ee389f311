"""histogram_correction: μ is the exact mean of the smallest share, corrected = max(error − μ, 0), score its sum."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from error_maps import assert_gradient_matches_reference, assert_matches_reference, errors, tied_images
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import memad_fast


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(3, 1, 17, 19), (1, 5), (2, 5000), (4, 3, 1, 1)])
def test_equals_the_float64_definition(isa: str, shape: tuple[int, ...], fraction: float, dtype: torch.dtype) -> None:
    assert_matches_reference(errors(*shape, dtype=dtype), fraction)


# Around the sizes where the search begins to aim by a sample (1,024) and where chunks end (16,384), and several chunks.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("pixels", [15, 16, 1023, 1025, 16383, 16385, 3 * 16384, 100_003])
def test_any_number_of_pixels(isa: str, pixels: int, dtype: torch.dtype) -> None:
    error = torch.stack([torch.randn(pixels).square(), torch.randn(pixels), torch.linspace(3, -1, pixels)]).to(dtype)
    for fraction in (0.0, 1 / pixels, 0.03, 0.5, 0.98, 1.0):
        assert_matches_reference(error, fraction)


@pytest.mark.parametrize("pixels", [40, 5000, 50_000])
def test_images_of_few_values(isa: str, pixels: int) -> None:
    error = tied_images(pixels)
    for fraction in (0.0, 0.1, 0.44, 0.5, 0.56, 0.9, 1.0):
        assert_matches_reference(error, fraction)


def sampled_places(n: int) -> Tensor:
    """Where the kernel looks first among n > 1,024 values (``aim`` in histogram_correction_kernel.cpp)."""
    size = 256
    while size < 4096 and size * 64 <= n:
        size *= 2
    index = torch.arange(size)
    stretch = n // size
    return index * stretch + (((index * 2654435769) % 2**32) * stretch >> 32)


@pytest.mark.parametrize("lie", [-1.0, 7.0, torch.inf])
def test_a_sample_that_misleads_changes_nothing(isa: str, lie: float) -> None:
    error = torch.rand(2, 40_000)
    error[0, sampled_places(40_000)] = lie
    assert_matches_reference(error, 0.5)


def test_a_sample_wider_than_the_image_changes_nothing(isa: str) -> None:
    """Most of the image lies between the values that the sample gives for its median."""
    error = 0.499 + 0.002 * torch.rand(1, 40_000)
    places = sampled_places(40_000)
    error[0, places] = torch.linspace(0, 1, len(places))
    assert_matches_reference(error, 0.5)


@pytest.mark.parametrize("lie", [0.4995, 0.5005])
def test_a_second_sample_that_misleads_changes_nothing(isa: str, lie: float) -> None:
    """The first sample is right: the median lies in (0.4, 0.6), with 20,000 others. The sample of those is not."""
    pixels, inside = 400_000, 20_000
    places = sampled_places(pixels)
    others = torch.ones(pixels, dtype=torch.bool)
    others[places] = False
    middle = 0.499 + 0.002 * torch.rand(inside)
    middle[sampled_places(inside)] = lie
    rest = int(others.sum()) - inside
    values = torch.cat([torch.zeros(rest // 2), torch.ones(rest - rest // 2), middle])
    kept = torch.arange(len(values)) >= rest
    order = torch.randperm(len(values))
    values, kept = values[order], kept[order]
    values[kept] = middle
    error = torch.empty(1, pixels)
    error[0, others] = values
    error[0, places] = (torch.arange(len(places)) >= len(places) // 2).float()
    error[0, places[:400]], error[0, places[-400:]] = 0.4, 0.6
    assert_matches_reference(error, 0.5)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=80),
    fraction=st.floats(0, 1),
)
def test_mean_of_the_smallest_is_exact_for_any_floats(values: list[float], fraction: float) -> None:
    error = torch.tensor([values])
    _, mu, _ = memad_fast.histogram_correction(error, fraction)
    count = int(np.floor(fraction * len(values)))
    expected = np.sort(np.array(values, dtype=np.float64))[:count].mean() if count else 0.0
    largest = np.abs(values).max()
    assert abs(mu.item() - expected) <= 1e-6 * abs(expected) + 1e-12 * largest + 1e-44


def test_ties_and_signed_zeros_do_not_change_the_mean(isa: str) -> None:
    error = torch.tensor([[0.0, -0.0, 1.0, 1.0, 1.0, 2.0, -3.0, -3.0]])
    _, mu, score = memad_fast.histogram_correction(error, 0.75)
    assert mu.item() == pytest.approx((-3 - 3 + 0 + 0 + 1 + 1) / 6)
    assert score.item() == pytest.approx(sum(max(v - mu.item(), 0) for v in error[0].tolist()), rel=1e-6)


def test_nan_stays_in_its_own_image(isa: str) -> None:
    error = errors(3, 40)
    error[1, 7] = torch.nan
    corrected, mu, score = memad_fast.histogram_correction(error, 0.5)
    assert corrected[1].isnan().all()
    assert mu[1].isnan()
    assert score[1].isnan()
    assert_matches_reference(error[[0, 2]], 0.5)


def test_infinity_follows_the_formula(isa: str) -> None:
    error = torch.tensor([[1.0, 2.0, torch.inf, 3.0]])
    corrected, mu, score = memad_fast.histogram_correction(error, 0.5)
    assert mu.item() == 1.5
    assert corrected.tolist() == [[0.0, 0.5, torch.inf, 1.5]]
    assert score.item() == torch.inf


@pytest.mark.parametrize("shape", [(0, 4, 4), (2, 0), (0,)])
def test_empty_input_gives_empty_results(shape: tuple[int, ...]) -> None:
    corrected, mu, score = memad_fast.histogram_correction(torch.empty(shape), 0.5)
    assert corrected.shape == shape
    assert mu.tolist() == score.tolist() == [0.0] * shape[0]


def test_strided_and_expanded_inputs_give_the_same(isa: str) -> None:
    error = errors(4, 6, 10)
    for view in (error.transpose(1, 2), error[::2, :, ::3], error[:1].expand(5, 6, 10)):
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


def test_results_do_not_depend_on_batch_threads_or_instruction_set() -> None:
    """5 images on 2 and 3 threads: some are done whole by one thread, some by all threads together."""
    from memad_fast import native

    error = errors(5, 50_001)
    threads = torch.get_num_threads()
    results = []
    try:
        for level in native.isas():
            native.set_isa(level)
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(forward_and_gradient(error))
                each = [forward_and_gradient(row[None]) for row in error]
                results.append([torch.cat(parts) for parts in zip(*each, strict=True)])
    finally:
        torch.set_num_threads(threads)
        native.set_isa("auto")
    for result in results[1:]:
        for got, expected in zip(result, results[0], strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 7, 11), (3, 130, 150)])
def test_gradient_equals_the_references(isa: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    error = errors(*shape, dtype=dtype)
    error[:, 0] = error[:, 1]  # ties
    for fraction in (0.0, 0.4, 1.0):
        assert_gradient_matches_reference(error, fraction)


def test_gradient_of_images_of_few_values(isa: str) -> None:
    """Where the error equals mu exactly (all zero, say), corrected passes no gradient."""
    chance = torch.rand(20_000)
    error = torch.stack(
        [torch.zeros(20_000), torch.where(chance < 0.7, 0.0, chance), torch.where(chance < 0.5, -2.5, 2.5)]
    )
    for fraction in (0.0, 0.25, 0.5):
        assert_gradient_matches_reference(error, fraction)


def test_gradient_of_an_image_with_nan_is_nan(isa: str) -> None:
    error = errors(2, 20_000)
    error[1, 3] = torch.nan
    error.requires_grad_()
    memad_fast.histogram_correction(error, 0.5)[2].sum().backward()
    assert error.grad is not None
    assert error.grad[0].isfinite().all()
    assert error.grad[1].isnan().all()


def test_gradcheck() -> None:
    error = torch.randn(2, 13, dtype=torch.float64).abs().requires_grad_()
    torch.autograd.gradcheck(lambda x: memad_fast.histogram_correction(x, 0.5), (error,))


def test_opcheck() -> None:
    for requires_grad in (False, True):
        error = errors(2, 3, 5).requires_grad_(requires_grad)
        torch.library.opcheck(torch.ops.memad_fast.histogram_correction.default, (error, 0.5))


def test_compiles_and_exports_as_one_graph() -> None:
    error = errors(2, 9)
    expected = memad_fast.histogram_correction(error, 0.5)
    compiled = torch.compile(memad_fast.histogram_correction, fullgraph=True)(error, 0.5)

    class Module(torch.nn.Module):
        def forward(self, error: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return memad_fast.histogram_correction(error, 0.5)

    exported = torch.export.export(Module(), (error,)).module()(error)
    for got in (compiled, exported):
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)


def test_more_elements_than_32_bits_keep_their_shape() -> None:
    error = torch.empty(2, 2**31 + 1, device="meta")
    corrected, mu, _ = memad_fast.histogram_correction(error, 0.5)
    assert corrected.shape == error.shape
    assert mu.shape == (2,)


def test_bad_input_names_the_argument() -> None:
    with pytest.raises(TypeError, match=r"error: expected a torch.Tensor, got list"):
        memad_fast.histogram_correction([1.0], 0.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"error: expected float32.*got torch.int64"):
        memad_fast.histogram_correction(torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"error: expected at least 1 dimension"):
        memad_fast.histogram_correction(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"fraction: expected 0 to 1, got 1.5"):
        memad_fast.histogram_correction(errors(1, 4), 1.5)
    with pytest.raises(ValueError, match=r"fraction: expected 0 to 1, got nan"):
        memad_fast.histogram_correction(errors(1, 4), float("nan"))


def test_native_gives_the_same_bits(isa: str) -> None:
    from memad_fast import native

    error = errors(3, 5, 700)
    expected = memad_fast.histogram_correction(error, 0.3)
    for got, want in zip(native.histogram_correction(error.numpy(), 0.3), expected, strict=True):
        np.testing.assert_array_equal(got, want.numpy())
