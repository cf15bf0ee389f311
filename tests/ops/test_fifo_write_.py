"""fifo_write_: first in, first out, in place, as a row-by-row write would leave it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rings import assert_same, ring, row_by_row
from torch import Tensor

import memad_fast
from memad_fast.ops.fifo_write_ import reference


@pytest.mark.parametrize("write", [memad_fast.fifo_write_, reference])
@settings(max_examples=60, deadline=None)
@given(slots=st.integers(1, 7), count=st.integers(0, 20), cursor=st.integers(-20, 20))
def test_equals_a_row_by_row_write(write: Callable[..., None], slots: int, count: int, cursor: int) -> None:
    state = ring(slots, cursor=cursor)
    new_keys, new_values = torch.randn(count, 3), torch.randn(count, 2)
    expected = row_by_row(state, new_keys, new_values)
    write(*state, new_keys, new_values)
    assert_same(state, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_bit_for_bit(dtype: torch.dtype) -> None:
    state = ring(dtype=dtype)
    new_keys, new_values = torch.randn(4, 3).to(dtype), torch.randn(4, 2).to(dtype)
    new_keys[0, 0] = torch.nan
    new_keys[1, 0] = torch.inf
    expected = row_by_row(state, new_keys, new_values)
    memad_fast.fifo_write_(*state, new_keys, new_values)
    for got, want in zip(state, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_keys_and_values_may_differ_in_dtype() -> None:
    keys, values, cursor = torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.bfloat16), torch.tensor(0)
    memad_fast.fifo_write_(keys, values, cursor, torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bfloat16))
    assert keys[:, 0].tolist() == values[:, 0].tolist() == [1.0, 0.0, 0.0]


def test_writes_through_views_and_nothing_beside_them() -> None:
    wide_keys, wide_values = torch.zeros(6, 10), torch.zeros(2, 12)
    keys, values, cursor = wide_keys[:, 2:5], wide_values[:, ::2].T, torch.tensor([5])
    expected = row_by_row((keys, values, cursor), torch.ones(2, 6)[:, ::2], torch.ones(2, 2).T)
    memad_fast.fifo_write_(keys, values, cursor, torch.ones(2, 6)[:, ::2], torch.ones(2, 2).T)
    assert_same((keys, values, cursor), expected)
    assert wide_keys.sum() == 2 * 3
    assert wide_values.sum() == 2 * 2


def test_no_new_rows_change_nothing() -> None:
    state = ring()
    before = tuple(x.clone() for x in state)
    memad_fast.fifo_write_(*state, torch.empty(0, 3), torch.empty(0, 2))
    assert_same(state, before)


def test_returns_nothing_and_records_nothing() -> None:
    state = ring()
    new_keys = torch.randn(2, 3, requires_grad=True)
    assert memad_fast.fifo_write_(*state, new_keys, torch.randn(2, 2)) is None
    assert not state[0].requires_grad


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.memad_fast.fifo_write_.default, (*ring(), torch.randn(7, 3), torch.randn(7, 2)))


def test_compiles_as_one_graph() -> None:
    def step(keys: Tensor, values: Tensor, cursor: Tensor, new_keys: Tensor, new_values: Tensor) -> Tensor:
        memad_fast.fifo_write_(keys, values, cursor, new_keys, new_values)
        return keys * 2

    eager = ring()
    traced = tuple(x.clone() for x in eager)
    new_keys, new_values = torch.randn(3, 3), torch.randn(3, 2)
    expected = step(*eager, new_keys, new_values)
    got = torch.compile(step, fullgraph=True)(*traced, new_keys, new_values)
    assert torch.equal(got, expected)
    assert_same(traced, eager)


def test_exports_as_one_graph() -> None:
    class Memory(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, value in zip(("keys", "values", "cursor"), ring(), strict=True):
                self.register_buffer(name, value)

        def forward(self, new_keys: Tensor, new_values: Tensor) -> Tensor:
            memad_fast.fifo_write_(self.keys, self.values, self.cursor, new_keys, new_values)
            return self.keys.sum(dim=1)

    memory = Memory()
    exported = torch.export.export(copy.deepcopy(memory), (torch.zeros(2, 3), torch.zeros(2, 2))).module()
    new_keys, new_values = torch.randn(2, 3), torch.randn(2, 2)
    expected = memory(new_keys, new_values)
    assert torch.equal(exported(new_keys, new_values), expected)
    assert_same((exported.keys, exported.values, exported.cursor), (memory.keys, memory.values, memory.cursor))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"keys": [1.0]}, TypeError, r"keys: expected a torch.Tensor, got list"),
        ({"keys": torch.zeros(5)}, ValueError, r"keys: expected 2 dimensions \[M, D\]"),
        ({"keys": torch.zeros(0, 3), "values": torch.zeros(0, 2)}, ValueError, r"keys: expected at least 1 row"),
        ({"keys": torch.zeros(5, 3, dtype=torch.int64)}, TypeError, r"keys: expected float32.*int64"),
        ({"keys": torch.zeros(1, 3).expand(5, 3)}, ValueError, r"keys: expected elements with memory of their own"),
        ({"values": torch.zeros(5, 1).expand(5, 2)}, ValueError, r"values: expected elements with memory of their own"),
        ({"keys": torch.zeros(7).as_strided((5, 3), (1, 1))}, ValueError, r"keys: expected elements with memory"),
        ({"values": torch.zeros(4, 2)}, ValueError, r"values: expected 5 like keys in dimension 0"),
        ({"cursor": 3}, TypeError, r"cursor: expected a torch.Tensor, got int"),
        ({"cursor": torch.tensor(3.0)}, TypeError, r"cursor: expected torch.int64"),
        ({"cursor": torch.tensor([1, 2])}, ValueError, r"cursor: expected one element"),
        ({"new_keys": torch.zeros(2, 4)}, ValueError, r"new_keys: expected 3 like keys in dimension 1"),
        ({"new_keys": torch.zeros(2, 3).half()}, TypeError, r"new_keys: expected torch.float32 like keys"),
        ({"new_values": torch.zeros(3, 2)}, ValueError, r"new_values: expected 2 like new_keys in dimension 0"),
        ({"new_values": torch.zeros(2, 2, device="meta")}, ValueError, r"new_values: expected device cpu like values"),
        ({"keys": torch.zeros(5, 3, requires_grad=True)}, ValueError, r"keys: expected a tensor without gradient"),
    ],
)
def test_bad_input_names_the_argument(changes: dict, error: type[Exception], message: str) -> None:
    names = ("keys", "values", "cursor", "new_keys", "new_values")
    arguments = dict(zip(names, (*ring(), torch.zeros(2, 3), torch.zeros(2, 2)), strict=True), **changes)
    with pytest.raises(error, match=message):
        memad_fast.fifo_write_(**arguments)


def test_a_backward_that_needs_overwritten_rows_is_refused() -> None:
    query, keys = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    distances, _ = memad_fast.nearest_keys(query, keys)
    memad_fast.fifo_write_(keys, torch.randn(5, 2), torch.tensor(0), torch.randn(5, 4), torch.randn(5, 2))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        distances.sum().backward()


def test_writes_inference_tensors() -> None:
    with torch.inference_mode():
        keys, values, cursor = torch.zeros(3, 1), torch.zeros(3, 1), torch.tensor(2)
        memad_fast.fifo_write_(keys, values, cursor, torch.ones(1, 1), torch.ones(1, 1))
    assert keys.flatten().tolist() == [0.0, 0.0, 1.0]
