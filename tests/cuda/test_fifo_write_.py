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

extern "C" int fifo_write(char* keys, int64_t keys_stride, const char* new_keys, int64_t new_keys_stride,
                          int64_t key_bytes, char* values, int64_t values_stride, const char* new_values,
                          int64_t new_values_stride, int64_t value_bytes, int64_t* cursor, int64_t size,
                          int64_t count) {
  return memad_fast::cuda::fifo_write({keys, keys_stride, new_keys, new_keys_stride, key_bytes},
                                      {values, values_stride, new_values, new_values_stride, value_bytes}, cursor,
                                      size, count, nullptr);
}
"""


@pytest.fixture(params=ORDERS)
def kernels(request: pytest.FixtureRequest) -> Model:
    library = model(SHIM)
    library.set_order(request.param)
    return library


def fifo_write(
    kernels: Model, keys: Tensor, values: Tensor, cursor: Tensor, new_keys: Tensor, new_values: Tensor
) -> None:
    arguments = []
    for ring, rows in ((keys, new_keys), (values, new_values)):
        size = ring.element_size()
        arguments += [ring, ring.stride(0) * size, rows, rows.stride(0) * size, ring.shape[1] * size]
    kernels.call("fifo_write", *arguments, cursor, keys.shape[0], new_keys.shape[0])


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
