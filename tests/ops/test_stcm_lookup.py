"""stcm_lookup: the value beside the nearest key, and nothing silent where there is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import memad_fast
from memad_fast.ops.stcm_lookup import reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def inputs(count: int = 20, rows: int = 50, dim: int = 9, width: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(count, dim), torch.randn(rows, dim), torch.randn(rows, width)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value_dtype", DTYPES)
@pytest.mark.parametrize("count", [2, 30])
def test_reads_the_value_of_the_nearest_key(isa: str, dtype: torch.dtype, value_dtype: torch.dtype, count: int) -> None:
    query, keys, values = inputs(count)
    query, keys, values = query.to(dtype), keys.to(dtype), values.to(value_dtype)
    expected = memad_fast.nearest_keys(query, keys)
    for searched in (keys, memad_fast.prepare_keys(keys)):
        read, distances, indices = memad_fast.stcm_lookup(query, searched, values)
        assert torch.equal(distances, expected[0][:, 0])
        assert torch.equal(indices, expected[1][:, 0])
        assert read.dtype == value_dtype
        assert torch.equal(read, values[indices])


@pytest.mark.parametrize("count", [2, 30])
def test_searches_only_the_filled_rows(isa: str, count: int) -> None:
    query, keys, values = inputs(count)
    expected = memad_fast.stcm_lookup(query, keys[:18].clone(), values[:18].clone())
    for filled in (18, torch.tensor(18), torch.tensor([18])):
        for searched in (keys, memad_fast.prepare_keys(keys)):
            for got, want in zip(memad_fast.stcm_lookup(query, searched, values, filled=filled), expected, strict=True):
                assert torch.equal(got, want)


@pytest.mark.parametrize("value_dtype", DTYPES)
@pytest.mark.parametrize("count", [2, 30])
def test_what_finds_nothing_is_nan_throughout(isa: str, value_dtype: torch.dtype, count: int) -> None:
    query, keys, values = inputs(count)
    query[1, 0] = torch.nan
    read, distances, indices = memad_fast.stcm_lookup(query, keys, values.to(value_dtype))
    assert indices[1] == -1
    assert distances[1].isnan()
    assert read[1].isnan().all()
    assert not read[0].isnan().any()
    read, distances, indices = memad_fast.stcm_lookup(query, keys, values, filled=torch.tensor(0))
    assert (indices == -1).all()
    assert distances.isnan().all()
    assert read.isnan().all()


@pytest.mark.parametrize("filled", [None, 30])
def test_equals_the_reference(isa: str, filled: int | None) -> None:
    query, keys, values = inputs()
    limit = None if filled is None else torch.tensor(filled)
    expected = reference(query.double(), keys.double(), values, limit)
    read, distances, indices = memad_fast.stcm_lookup(query, keys, values, filled=filled)
    assert torch.equal(indices, expected[2])
    assert torch.equal(read, expected[0])
    torch.testing.assert_close(distances.double(), expected[1], rtol=1e-6, atol=0)


def test_empty_queries_and_widthless_values(isa: str) -> None:
    query, keys, values = inputs()
    assert [tuple(x.shape) for x in memad_fast.stcm_lookup(query[:0], keys, values)] == [(0, 7), (0,), (0,)]
    assert memad_fast.stcm_lookup(query, keys, values[:, :0])[0].shape == (20, 0)


def test_views_give_the_same_as_copies(isa: str) -> None:
    query, keys, wide = inputs(width=30)
    for values in (wide[:, 3:9], wide.T.contiguous().T, wide[:1].expand(50, 30)):
        read, _, indices = memad_fast.stcm_lookup(query, keys, values)
        assert torch.equal(read, values[indices])


@pytest.mark.parametrize("value_dtype", DTYPES)
def test_gradients_equal_the_references(isa: str, value_dtype: torch.dtype) -> None:
    query, keys, values = inputs(rows=6)
    query[3, 2] = torch.nan
    values = values.to(value_dtype)
    weights = torch.randn(20, 8)
    grads = []
    for wide in (False, True):
        leaves = [(x.double() if wide else x.clone()).requires_grad_() for x in (query, keys, values)]
        read, distances, indices = memad_fast.stcm_lookup(*leaves)
        found = indices >= 0
        total = (read[found].double() * weights[found, :7]).sum() + (distances[found] * weights[found, 7]).sum()
        grads.append(torch.autograd.grad(total, leaves))
    for got, expected in zip(*grads, strict=True):
        tolerance = {torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 3e-2}[got.dtype]
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


def test_gradients_are_the_same_bits_on_any_number_of_threads() -> None:
    leaves = [x.requires_grad_() for x in inputs(count=700, rows=3)]
    threads, grads = torch.get_num_threads(), []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            read, distances, _ = memad_fast.stcm_lookup(*leaves)
            grads.append(torch.autograd.grad(read.square().sum() + distances.sum(), leaves))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in grads[1:] for a, b in zip(other, grads[0], strict=True))


def test_gradcheck() -> None:
    leaves = [x.double().requires_grad_() for x in inputs(count=5, rows=4, dim=3, width=2)]
    torch.autograd.gradcheck(lambda *x: memad_fast.stcm_lookup(*x)[:2], leaves)


def test_opcheck() -> None:
    op = torch.ops.memad_fast.stcm_lookup
    for requires_grad in (False, True):
        query, keys, values = (x.requires_grad_(requires_grad) for x in inputs())
        torch.library.opcheck(op.default, (query, keys, values, None, None))
        packed = memad_fast.prepare_keys(keys).packed
        torch.library.opcheck(op.default, (query, keys, values, packed, torch.tensor(9)))
    backward = torch.ops.memad_fast.stcm_lookup_backward_values
    torch.library.opcheck(backward.default, (torch.randn(20, 7), values.detach(), torch.randint(-1, 50, (20,))))


def test_compiles_and_exports_as_one_graph() -> None:
    query, keys, values = inputs()
    filled = torch.tensor(30)

    class Read(torch.nn.Module):
        def forward(self, query: Tensor, keys: Tensor, values: Tensor, filled: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return memad_fast.stcm_lookup(query, keys, values, filled=filled)

    expected = memad_fast.stcm_lookup(query, keys, values, filled=30)
    calls = [
        torch.compile(lambda q: memad_fast.stcm_lookup(q, keys, values, filled=30), fullgraph=True)(query),
        torch.compile(lambda q: memad_fast.stcm_lookup(q, keys, values, filled=filled), fullgraph=True)(query),
        torch.export.export(Read(), (query, keys, values, filled)).module()(query, keys, values, filled),
    ]
    for got in calls:
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)


def test_more_elements_than_32_bits_keep_their_shape() -> None:
    query, keys, values = (torch.empty(*shape, device="meta") for shape in ((2**31 + 1, 2), (5, 2), (5, 3)))
    read, distances, indices = memad_fast.stcm_lookup(query, keys, values)
    assert read.shape == (2**31 + 1, 3)
    assert distances.shape == indices.shape == (2**31 + 1,)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query": [1.0]}, TypeError, r"query: expected a torch.Tensor, got list"),
        ({"keys": torch.randn(50, 8)}, ValueError, r"keys: expected 9 like query"),
        ({"values": torch.randn(49, 7)}, ValueError, r"values: expected 50 like keys in dimension 0"),
        ({"values": torch.randn(50)}, ValueError, r"values: expected 2 dimensions \[M, V\]"),
        ({"values": torch.ones(50, 7, dtype=torch.int64)}, TypeError, r"values: expected float32.*int64"),
        ({"values": torch.ones(50, 7).double()}, TypeError, r"values: expected float32, .* got torch.float64"),
        ({"filled": 0}, ValueError, r"filled: expected 1 to 50 .*, got 0"),
        ({"filled": 51}, ValueError, r"filled: expected 1 to 50 .*, got 51"),
        ({"filled": 2.0}, TypeError, r"filled: expected an int or a tensor, got float"),
        ({"filled": torch.tensor(2.0)}, TypeError, r"filled: expected torch.int64"),
        ({"filled": torch.tensor([2, 3])}, ValueError, r"filled: expected one element, got shape \(2,\)"),
    ],
)
def test_bad_input_names_the_argument(changes: dict, error: type[Exception], message: str) -> None:
    arguments = dict(zip(("query", "keys", "values"), inputs(), strict=True), **changes)
    with pytest.raises(error, match=message):
        memad_fast.stcm_lookup(**arguments)


def test_keys_prepared_for_another_metric_are_refused() -> None:
    query, keys, values = inputs()
    with pytest.raises(ValueError, match=r"metric: the keys were prepared for 'ip', got 'l2'"):
        memad_fast.stcm_lookup(query, memad_fast.prepare_keys(keys, metric="ip"), values)


@pytest.mark.parametrize("filled", [None, 30])
def test_native_gives_the_same_bits(isa: str, filled: int | None) -> None:
    from memad_fast import native

    query, keys, values = inputs()
    expected = memad_fast.stcm_lookup(query, keys, values, filled=filled)
    got = native.stcm_lookup(query.numpy(), keys.numpy(), values.numpy(), filled=filled)
    for array, tensor in zip(got, expected, strict=True):
        np.testing.assert_array_equal(array, tensor.numpy())
