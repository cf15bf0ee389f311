"""The Triton read of the structure-texture memory, in Triton's interpreter: the CPU's bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import memad_fast.ops  # defines torch.ops.memad_fast
from memad_fast import _triton
from memad_fast.kernels import slot_sums
from memad_fast.memory import StructureTextureMemory

pytestmark = pytest.mark.skipif(
    not _triton.serves_cpu_tensors(), reason="Triton's interpreter is off (tests/gpu does the same on a GPU)"
)

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
backward_values = torch.ops.memad_fast.stcm_lookup_backward_values


def assert_reads_as_the_cpu(
    query: Tensor, keys: Tensor, values: Tensor, filled: int | Tensor | None = None, *, prepared: bool = False
) -> None:
    """The same rows of values bit for bit, the same indices and distances; NaN where nothing is found."""
    expected = memad_fast.stcm_lookup(query, keys, values, filled=filled)
    with memad_fast.use_backend("triton"):
        searched = memad_fast.prepare_keys(keys) if prepared else keys
        got = memad_fast.stcm_lookup(query, searched, values, filled=filled)
    for ours, cpus in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, cpus, rtol=0, atol=0, equal_nan=True)
    found = got[2] >= 0
    assert torch.equal(got[0][found].view(torch.uint8), values[got[2][found]].view(torch.uint8))
    assert got[0][~found].isnan().all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value_dtype", FLOATS)
@pytest.mark.parametrize("prepared", [False, True])
def test_reads_the_value_of_the_nearest_key(dtype: torch.dtype, value_dtype: torch.dtype, prepared: bool) -> None:
    query, keys, values = torch.randn(5, 9).to(dtype), torch.randn(40, 9).to(dtype), torch.randn(40, 7).to(value_dtype)
    query[2, 3], values[:, 1] = torch.nan, -0.0
    assert_reads_as_the_cpu(query, keys, values, prepared=prepared)


@pytest.mark.parametrize("filled", [0, 1, 17, 40, 50, -3])
@pytest.mark.parametrize("prepared", [False, True])
def test_searches_only_the_filled_rows(filled: int, prepared: bool) -> None:
    query, keys, values = torch.randn(5, 9), torch.randn(40, 9), torch.randn(40, 7)
    keys[filled:] = query[0]  # would be nearest
    assert_reads_as_the_cpu(query, keys, values, torch.tensor([filled]), prepared=prepared)


@pytest.mark.parametrize(("count", "width"), [(0, 7), (3, 0), (1, 1), (2, 1025), (3, 1500)])
def test_any_width_of_values(count: int, width: int) -> None:
    assert_reads_as_the_cpu(torch.randn(count, 4), torch.randn(6, 4), torch.randn(6, width))


def test_strided_values_and_queries() -> None:
    query, keys, wide = torch.randn(5, 18)[:, ::2], torch.randn(9, 40).T, torch.randn(40, 30)
    for values in (wide[:, 3:9], wide.T.contiguous().T, wide[:1].expand(40, 30), wide[:, ::4]):
        assert_reads_as_the_cpu(query, keys, values)


def test_a_step_of_the_memory_is_the_cpus() -> None:
    memories = [StructureTextureMemory(8, 5, 3) for _ in range(2)]
    for _ in range(4):
        keys, values = torch.randn(3, 5), torch.randn(3, 3)
        found = []
        for memory, backend in zip(memories, ("triton", None), strict=True):
            with memad_fast.use_backend(backend):
                memory.train().write(keys, values)
                found += [memory(keys + 1), memory.eval()(keys + 1)]
        assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
    for name, value in memories[0].state_dict().items():
        assert torch.equal(value, memories[1].state_dict()[name])


def test_gradients_reach_every_input() -> None:
    grads = []
    for backend in ("triton", None):
        torch.manual_seed(1)
        leaves = [torch.randn(6, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True), torch.randn(4, 3)]
        leaves[2].requires_grad_()
        with memad_fast.use_backend(backend):
            read, distances, _ = memad_fast.stcm_lookup(*leaves)
            grads.append(torch.autograd.grad(read.square().sum() + distances.sum(), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


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
