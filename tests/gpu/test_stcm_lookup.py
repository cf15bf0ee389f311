"""stcm_lookup on the GPU: the CPU's bits, of as many rows as a tensor on the device says are filled."""

from __future__ import annotations

import pytest
import torch
from carried import on
from torch import Tensor
from where import DEVICE, DTYPES, each_backend, sized

import memad_fast
from memad_fast.ops.stcm_lookup import reference

pytestmark = each_backend("stcm_lookup", "prepare_keys")


def inputs(count: int = 20, rows: int = 50, dim: int = 64, width: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(count, dim), torch.randn(rows, dim), torch.randn(rows, width)


def assert_reads_like_the_cpu(query: Tensor, keys: Tensor, values: Tensor, filled: int | None = None) -> None:
    with memad_fast.use_backend("cpu"):
        limit = None if filled is None else torch.tensor(filled)
        expected = memad_fast.stcm_lookup(query, keys, values, filled=limit)
    query, keys, values = query.to(DEVICE), keys.to(DEVICE), values.to(DEVICE)
    limits = [None] if filled is None else [torch.tensor(filled, device=DEVICE), torch.tensor([filled], device=DEVICE)]
    limits += [filled] if filled is not None and 1 <= filled <= len(keys) else []
    for searched in (keys, memad_fast.prepare_keys(keys)):
        for limit in limits:
            got = memad_fast.stcm_lookup(query, searched, values, filled=limit)
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a.cpu(), b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value_dtype", DTYPES)
def test_reads_the_value_of_the_nearest_key(backend: str, dtype: torch.dtype, value_dtype: torch.dtype) -> None:
    for shape in sized([(2, 50), (30, 50), (196, 2048), (1000, 300)], [(2, 50)]):
        query, keys, values = inputs(*shape)
        assert_reads_like_the_cpu(query.to(dtype), keys.to(dtype), values.to(value_dtype))


@pytest.mark.parametrize("width", [0, 1, 7, 129, 512])
def test_values_of_any_width(backend: str, width: int) -> None:
    assert_reads_like_the_cpu(*inputs(sized(300, 5), sized(500, 40), width=width))


@pytest.mark.parametrize("count", [2, 30])
def test_searches_only_the_filled_rows(backend: str, count: int) -> None:
    """Whatever the value is: it is clamped to the rows there are, and of none nothing is found."""
    query, keys, values = inputs(count, sized(700, 50))
    for filled in (1, 18, 31, 33, len(keys) - 1, len(keys), 0, -3, len(keys) + 5):
        assert_reads_like_the_cpu(query, keys, values, filled)


def test_an_unfilled_row_cannot_hide_the_nearest(backend: str) -> None:
    """Rows that are not filled equal the queries; they must lower no bound."""
    query, keys, values = inputs(sized(60, 6), sized(500, 60))
    keys[20 : 20 + len(query)] = query
    for filled in (5, 20):
        assert_reads_like_the_cpu(query, keys, values, filled)


def test_what_finds_nothing_is_nan_throughout(backend: str) -> None:
    query, keys, values = inputs()
    query[1, 0] = torch.nan
    assert_reads_like_the_cpu(query, keys, values)
    assert_reads_like_the_cpu(query, torch.full_like(keys, torch.inf), values)
    assert_reads_like_the_cpu(query[:0], keys, values)


def test_values_are_read_through_their_strides(backend: str) -> None:
    query, keys, wide = (x.to(DEVICE) for x in inputs(width=30))
    for values in (wide[:, 3:9], wide.T.contiguous().T, wide[:1].expand(50, 30)):
        read, _, indices = memad_fast.stcm_lookup(query, keys, values)
        assert torch.equal(read, values[indices])


@pytest.mark.parametrize("value_dtype", DTYPES)
def test_gradients_equal_the_references(backend: str, value_dtype: torch.dtype) -> None:
    query, keys, values = inputs(sized(500, 20), rows=6)
    query[3, 2] = torch.nan
    values = values.to(value_dtype)
    weights = torch.randn(len(query), 8)
    grads = []
    for wide, call in ((False, on(DEVICE, memad_fast.stcm_lookup)), (True, reference)):
        leaves = [(x.double() if wide else x.clone()).requires_grad_() for x in (query, keys, values)]
        read, distances, indices = call(*leaves)
        found = indices >= 0
        total = (read[found].double() * weights[found, :7]).sum() + (distances[found] * weights[found, 7]).sum()
        grads.append(torch.autograd.grad(total, leaves))
    for got, expected in zip(*grads, strict=True):
        tolerance = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 3e-2}[got.dtype]
        largest = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance * largest)
