"""The CUDA kernels of fifo_write_ on the model of CUDA (tests/cuda_model) give what the CPU op gives."""

from __future__ import annotations

import pytest
import torch
from cuda_model.build import ORDERS, Model, model, needs_compiler
from torch import Tensor

import memad_fast

pytestmark = needs_compiler

SHIM = """
#include "cuda/fifo_write_.cu"

using memad_fast::cuda::RingCopy;

extern "C" int fifo_write(RingCopy* keys, RingCopy* values, int64_t* cursor, int64_t size, int64_t count) {
  return memad_fast::cuda::fifo_write(*keys, *values, cursor, size, count, nullptr);
}
"""


@pytest.fixture(params=ORDERS)
def kernels(request: pytest.FixtureRequest) -> Model:
    library = model(SHIM)
    library.set_order(request.param)
    return library


def ring_copy(ring: Tensor, rows: Tensor) -> Tensor:
    """The fields of a RingCopy, eight bytes each."""
    size = ring.element_size()
    fields = [[part.data_ptr(), *(stride * size for stride in part.stride())] for part in (ring, rows)]
    return torch.tensor([*fields[0], *fields[1], ring.shape[1], size])


def fifo_write(
    kernels: Model, keys: Tensor, values: Tensor, cursor: Tensor, new_keys: Tensor, new_values: Tensor
) -> None:
    copies = ring_copy(keys, new_keys), ring_copy(values, new_values)
    kernels.call("fifo_write", *copies, cursor, keys.shape[0], new_keys.shape[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("width", [1, 7, 64, 513])
def test_equals_the_cpus(kernels: Model, width: int, dtype: torch.dtype) -> None:
    state = [torch.zeros(10, width, dtype=dtype), torch.zeros(10, 3, dtype=dtype), torch.tensor(4)]
    expected = [part.clone() for part in state]
    for count in (3, 0, 9, 25, 10, 1):
        keys, values = torch.randn(count, width).to(dtype), torch.randn(count, 3).to(dtype)
        memad_fast.fifo_write_(*expected, keys, values)
        fifo_write(kernels, *state, keys, values)
        for got, want in zip(state, expected, strict=True):
            assert torch.equal(got, want)


def test_writes_nothing_beside_strided_rows(kernels: Model) -> None:
    wide_keys, wide_values = torch.zeros(6, 40), torch.zeros(6, 12)
    keys, values, cursor = wide_keys[:, 4:20], wide_values[:, 1:4], torch.tensor([5])
    fifo_write(kernels, keys, values, cursor, torch.ones(2, 32)[:, :16], torch.ones(2, 6)[:, 2:5])
    assert cursor.tolist() == [1]
    assert keys.sum(dim=1).tolist() == [16, 0, 0, 0, 0, 16]
    assert values.sum(dim=1).tolist() == [3, 0, 0, 0, 0, 3]
    assert wide_keys.sum() == 2 * 16
    assert wide_values.sum() == 2 * 3


@pytest.mark.parametrize("cursor", [-1, -23, 10, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("count", [0, 3, 25])
def test_any_cursor_counts_modulo_the_slots(kernels: Model, cursor: int, count: int) -> None:
    state = [torch.zeros(10, 4), torch.zeros(10, 3), torch.tensor(cursor)]
    expected = [part.clone() for part in state]
    new = torch.randn(count, 4), torch.randn(count, 3)
    memad_fast.fifo_write_(*expected, *new)
    fifo_write(kernels, *state, *new)
    for got, want in zip(state, expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_elements_may_lie_apart(kernels: Model, dtype: torch.dtype) -> None:
    wide, tall = torch.zeros(6, 10, dtype=dtype), torch.zeros(3, 6, dtype=dtype)
    keys, values, cursor = wide[:, 1:9:2], tall.T, torch.tensor(4)
    new_keys, new_values = torch.randn(4, 4).to(dtype).T, torch.randn(4, 1).to(dtype).expand(4, 3)
    expected = [keys.clone(), values.clone(), cursor.clone()]
    memad_fast.fifo_write_(*expected, new_keys, new_values)
    fifo_write(kernels, keys, values, cursor, new_keys, new_values)
    for got, want in zip((keys, values, cursor), expected, strict=True):
        assert torch.equal(got, want)
    assert torch.count_nonzero(wide[:, ::2]) == 0
