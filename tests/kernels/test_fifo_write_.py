"""The Triton ring write, in Triton's interpreter: the same bytes as the CPU's, and nothing beside them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import memad_fast
from memad_fast import _triton

pytestmark = pytest.mark.skipif(
    not _triton.serves_cpu_tensors(), reason="Triton's interpreter is off (tests/gpu does the same on a GPU)"
)

State = tuple[Tensor, Tensor, Tensor]


def ring(slots: int, key_dim: int, value_dim: int, cursor: int = 3) -> State:
    return torch.randn(slots, key_dim), torch.randn(slots, value_dim), torch.tensor(cursor)


def assert_writes_as_the_cpu(state: State, new_keys: Tensor, new_values: Tensor) -> None:
    """Bit for bit, NaN payloads too."""
    expected = tuple(x.clone() for x in state)
    memad_fast.fifo_write_(*expected, new_keys, new_values)
    with memad_fast.use_backend("triton"):
        memad_fast.fifo_write_(*state, new_keys, new_values)
    for got, want in zip(state, expected, strict=True):
        short = torch.int64 if got.element_size() == 8 else torch.int32 if got.element_size() == 4 else torch.int16
        assert torch.equal(got.contiguous().view(short), want.contiguous().view(short))


@pytest.mark.parametrize("cursor", [0, 3, 6, -1, -23, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("count", [0, 1, 4, 7, 30])
def test_any_cursor_and_any_number_of_rows(cursor: int, count: int) -> None:
    assert_writes_as_the_cpu(ring(7, 5, 3, cursor), torch.randn(count, 5), torch.randn(count, 3))


@pytest.mark.parametrize("slots", [1, 40])
@pytest.mark.parametrize(("key_dim", "value_dim"), [(1, 1), (0, 3), (64, 0), (1030, 7), (3, 2049)])
def test_any_width(slots: int, key_dim: int, value_dim: int) -> None:
    state = ring(slots, key_dim, value_dim, 38)
    assert_writes_as_the_cpu(state, torch.randn(5, key_dim), torch.randn(5, value_dim))


@pytest.mark.parametrize("keys", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("values", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_keys_and_values_keep_their_dtypes_and_bits(keys: torch.dtype, values: torch.dtype) -> None:
    state = (torch.zeros(5, 3, dtype=keys), torch.zeros(5, 2, dtype=values), torch.tensor(4))
    new_keys, new_values = torch.randn(2, 3).to(keys), torch.randn(2, 2).to(values)
    new_keys[0] = torch.tensor([torch.nan, torch.inf, -0.0])
    new_values[1] = -torch.nan
    assert_writes_as_the_cpu(state, new_keys, new_values)


def test_writes_through_views_and_nothing_beside_them() -> None:
    wide_keys, wide_values = torch.zeros(6, 10), torch.zeros(2, 12)
    state = (wide_keys[:, 2:8:2], wide_values[:, ::2].T, torch.tensor([5]))
    new_keys, new_values = torch.ones(2, 6)[:, ::2], torch.ones(2, 1).expand(2, 2).T
    with memad_fast.use_backend("triton"):
        memad_fast.fifo_write_(*state, new_keys, new_values)
    assert state[2].tolist() == [1]
    assert state[0].sum(dim=1).tolist() == [3, 0, 0, 0, 0, 3]
    assert state[1].sum(dim=1).tolist() == [2, 0, 0, 0, 0, 2]
    assert wide_keys.sum() == 2 * 3
    assert wide_values.sum() == 2 * 2


def test_repeated_writes_follow_the_cursor() -> None:
    state = ring(5, 2, 2, 0)
    for count in (2, 0, 4, 11, 1):
        assert_writes_as_the_cpu(state, torch.randn(count, 2), torch.randn(count, 2))
