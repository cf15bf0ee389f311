"""fifo_write_ on the GPU: as a row-by-row write would leave the ring, whatever the cursor on the device holds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rings import State, assert_same, row_by_row
from torch import Tensor
from where import DEVICE, DTYPES, each_backend, sized

import memad_fast

pytestmark = each_backend("fifo_write_")

many = settings(max_examples=sized(300, 20), deadline=None, suppress_health_check=list(HealthCheck))


def ring(slots: int, width: int, dtype: torch.dtype = torch.float32, cursor: int = 3) -> State:
    return torch.randn(slots, width).to(dtype), torch.randn(slots, 2).to(dtype), torch.tensor(cursor)


def on_device(state: State) -> State:
    return tuple(part.to(DEVICE) for part in state)


def assert_writes_row_by_row(state: State, new_keys: Tensor, new_values: Tensor) -> None:
    written = on_device(tuple(part.clone() for part in state))
    memad_fast.fifo_write_(*written, new_keys.to(DEVICE), new_values.to(DEVICE))
    for got, expected in zip(written, row_by_row(state, new_keys, new_values), strict=True):
        torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=0, equal_nan=True)


@many
@given(slots=st.integers(1, 40), count=st.integers(0, 100), cursor=st.integers(-100, 100), width=st.integers(1, 300))
def test_equals_a_row_by_row_write(backend: str, slots: int, count: int, cursor: int, width: int) -> None:
    assert_writes_row_by_row(ring(slots, width, cursor=cursor), torch.randn(count, width), torch.randn(count, 2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cursor", [-(2**63), -1, 2**62 + 5, 2**63 - 1])
def test_any_cursor_counts_modulo_the_slots(backend: str, cursor: int, dtype: torch.dtype) -> None:
    state = ring(7, 33, dtype, cursor)
    new_keys, new_values = torch.randn(4, 33).to(dtype), torch.randn(4, 2).to(dtype)
    new_keys[0, 0], new_keys[1, 0] = torch.nan, torch.inf
    reduced = (*state[:2], torch.tensor(cursor % 7))
    expected = row_by_row(reduced, new_keys, new_values)
    written = on_device(state)
    memad_fast.fifo_write_(*written, new_keys.to(DEVICE), new_values.to(DEVICE))
    for got, want in zip(written, expected, strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("width", [0, 1, 2, 3, 4, 5, 8, 16, 511, 512, 513])
def test_rows_of_any_alignment(backend: str, width: int) -> None:
    """Rows of any number of bytes, from addresses of any alignment."""
    for dtype in DTYPES:
        for first in (0, 1, 3):
            wide = torch.randn(9, width + 4).to(dtype).to(DEVICE)
            base = torch.randn(20, width + 4).to(dtype).to(DEVICE)
            keys, new_keys = base[:, first : first + width], wide[:, first : first + width]
            values, cursor = torch.zeros(20, 1, device=DEVICE), torch.tensor(15, device=DEVICE)
            before = base.clone()
            expected = row_by_row((keys.cpu(), values.cpu(), cursor.cpu()), new_keys.cpu(), torch.ones(9, 1))
            memad_fast.fifo_write_(keys, values, cursor, new_keys, torch.ones(9, 1, device=DEVICE))
            assert_same((keys.cpu(), values.cpu(), cursor.cpu()), expected)
            beside = [*range(first), *range(first + width, width + 4)]
            assert torch.equal(base[:, beside], before[:, beside])


def test_writes_through_views_and_nothing_beside_them(backend: str) -> None:
    wide_keys, wide_values = torch.zeros(6, 10, device=DEVICE), torch.zeros(2, 12, device=DEVICE)
    keys, values, cursor = wide_keys[:, 2:5], wide_values[:, ::2].T, torch.tensor([5], device=DEVICE)
    new_keys, new_values = torch.ones(2, 6, device=DEVICE)[:, ::2], torch.ones(2, 2, device=DEVICE).T
    expected = row_by_row((keys.cpu(), values.cpu(), cursor.cpu()), new_keys.cpu(), new_values.cpu())
    memad_fast.fifo_write_(keys, values, cursor, new_keys, new_values)
    assert_same((keys.cpu(), values.cpu(), cursor.cpu()), expected)
    assert wide_keys.sum() == 2 * 3
    assert wide_values.sum() == 2 * 2


def test_more_rows_than_slots_by_far(backend: str) -> None:
    slots, count = sized((1000, 70_003), (10, 53))
    state = ring(slots, 5)
    new_keys, new_values = torch.randn(count, 5), torch.randn(count, 2)
    written = on_device(tuple(part.clone() for part in state))
    memad_fast.fifo_write_(*written, new_keys.to(DEVICE), new_values.to(DEVICE))
    with memad_fast.use_backend("cpu"):
        memad_fast.fifo_write_(*state, new_keys, new_values)
    assert_same(tuple(part.cpu() for part in written), state)


def test_writes_inference_tensors(backend: str) -> None:
    with torch.inference_mode():
        keys, values, cursor = on_device((torch.zeros(3, 1), torch.zeros(3, 1), torch.tensor(2)))
        memad_fast.fifo_write_(keys, values, cursor, torch.ones(1, 1, device=DEVICE), torch.ones(1, 1, device=DEVICE))
    assert keys.flatten().tolist() == [0.0, 0.0, 1.0]


def test_a_backward_that_needs_overwritten_rows_is_refused(backend: str) -> None:
    state = on_device(ring(5, 4))
    weight = torch.randn(4, requires_grad=True, device=DEVICE)
    product = (state[0] * weight).sum()
    memad_fast.fifo_write_(*state, torch.randn(2, 4, device=DEVICE), torch.randn(2, 2, device=DEVICE))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
