"""histogram_correction: μ is the exact mean of the smallest share, corrected = max(error − μ, 0), score its sum."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import memad_fast
from memad_fast.ops.histogram_correction import reference

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def errors(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).abs().to(dtype)


def assert_matches_reference(error: Tensor, fraction: float) -> None:
    corrected, mu, score = memad_fast.histogram_correction(error, fraction)
    expected = reference(error.double(), fraction)
    tolerance = TOLERANCE[error.dtype]
    assert corrected.dtype == error.dtype
    assert corrected.shape == error.shape
    torch.testing.assert_close(mu.double(), expected[1], rtol=1e-6, atol=1e-30, equal_nan=True)
    torch.testing.assert_close(corrected.double(), expected[0], rtol=tolerance, atol=tolerance, equal_nan=True)
    torch.testing.assert_close(
        score.double(), corrected.double().flatten(1).sum(1), rtol=1e-6, atol=1e-30, equal_nan=True
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(3, 1, 17, 19), (1, 5), (2, 5000), (4, 3, 1, 1)])
def test_equals_the_float64_definition(isa: str, shape: tuple[int, ...], fraction: float, dtype: torch.dtype) -> None:
    assert_matches_reference(errors(*shape, dtype=dtype), fraction)


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


def test_results_do_not_depend_on_batch_or_threads(isa: str) -> None:
    error = errors(5, 9000)
    whole = memad_fast.histogram_correction(error, 0.5)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        parts = [memad_fast.histogram_correction(row[None], 0.5) for row in error]
    finally:
        torch.set_num_threads(threads)
    for index, got in enumerate(whole):
        assert torch.equal(got, torch.cat([part[index] for part in parts]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gradient_equals_the_references(isa: str, dtype: torch.dtype) -> None:
    error = errors(3, 7, 11, dtype=dtype)
    error[:, 0] = error[:, 1]  # ties
    grads = [torch.randn(3, 7, 11), torch.randn(3), torch.randn(3)]
    results = []
    for x, call in ((error.clone(), memad_fast.histogram_correction), (error.double(), reference)):
        x.requires_grad_()
        outputs = call(x, 0.4)
        total = sum((out.double() * g.double()).sum() for out, g in zip(outputs, grads, strict=True))
        results.append(torch.autograd.grad(total, x)[0].double())
    torch.testing.assert_close(results[0], results[1], rtol=3 * TOLERANCE[dtype], atol=3 * TOLERANCE[dtype])


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
