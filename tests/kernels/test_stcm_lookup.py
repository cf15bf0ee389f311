"""The Triton read of the structure-texture memory, in Triton's interpreter: the CPU's bits."""

from __future__ import annotations

import pytest
import torch

import memad_fast.ops  # defines torch.ops.memad_fast
from memad_fast import _triton
from memad_fast.kernels import slot_sums

pytestmark = pytest.mark.skipif(
    not _triton.serves_cpu_tensors(), reason="Triton's interpreter is off (tests/gpu does the same on a GPU)"
)

backward_values = torch.ops.memad_fast.stcm_lookup_backward_values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("queries", "rows", "width"), [(40, 6, 9), (3, 70, 600), (0, 4, 5), (5, 4, 0), (1, 1, 1)])
def test_the_values_gradient_has_the_cpus_bits(dtype: torch.dtype, queries: int, rows: int, width: int) -> None:
    grad, values = torch.randn(queries, width).to(dtype), torch.randn(rows, width).to(dtype)
    indices = torch.randint(-1, rows, (queries,))
    with memad_fast.use_backend("triton"):
        got = backward_values(grad, values, indices)
    assert torch.equal(got, backward_values(grad, values, indices))


def test_the_values_gradient_reads_strides_and_never_the_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot_sums, "_SEGMENT", 16)
    grad = torch.randn(6, 50).T[:, ::2]
    indices = torch.tensor([2] * 39 + [0] * 11)
    with memad_fast.use_backend("triton"):
        got = backward_values(grad, torch.full((4, 3), torch.nan), indices)
    expected = torch.zeros(4, 3, dtype=torch.float64).index_add_(0, indices, grad.double())
    torch.testing.assert_close(got, expected.float(), rtol=2**-22, atol=1e-30)
