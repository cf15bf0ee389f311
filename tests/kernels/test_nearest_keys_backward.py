"""The Triton gradients of nearest_keys, in Triton's interpreter: the CPU's bits, in the order of the queries."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import memad_fast.ops  # defines torch.ops.memad_fast
from memad_fast import _triton
from memad_fast.kernels import slot_sums

pytestmark = pytest.mark.skipif(
    not _triton.serves_cpu_tensors(), reason="Triton's interpreter is off (tests/gpu does the same on a GPU)"
)

METRICS = ["l2", "cosine", "ip"]


def inputs(
    queries: int, rows: int, dim: int, k: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    indices = torch.randint(-1, rows, (queries, k))
    return torch.randn(queries, k), torch.randn(queries, dim).to(dtype), torch.randn(rows, dim).to(dtype), indices


def gradients(*arguments: Tensor | str) -> tuple[Tensor, Tensor]:
    ops = torch.ops.memad_fast
    return ops.nearest_keys_backward_query(*arguments), ops.nearest_keys_backward_keys(*arguments)


def assert_same_bits(*arguments: Tensor | str) -> tuple[Tensor, Tensor]:
    with memad_fast.use_backend("triton"):
        got = gradients(*arguments)
    for ours, cpus in zip(got, gradients(*arguments), strict=True):
        assert torch.equal(ours, cpus)
    return got


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("queries", "rows", "dim", "k"), [(20, 6, 9, 1), (33, 3, 37, 2), (3, 4, 530, 3), (1, 1, 1, 1)])
def test_the_bits_are_the_cpus(metric: str, dtype: torch.dtype, queries: int, rows: int, dim: int, k: int) -> None:
    assert_same_bits(*inputs(queries, rows, dim, k, dtype), metric)


@pytest.mark.parametrize("metric", METRICS)
def test_bfloat16_within_a_rounding(metric: str) -> None:
    """The interpreter cuts float32 to bfloat16 where a GPU rounds."""
    arguments = inputs(30, 5, 11, 2, torch.bfloat16)
    with memad_fast.use_backend("triton"):
        got = gradients(*arguments, metric)
    for ours, cpus in zip(got, gradients(*arguments, metric), strict=True):
        torch.testing.assert_close(ours, cpus, rtol=2**-7, atol=1e-30)


@pytest.mark.parametrize("metric", METRICS)
def test_a_key_that_many_queries_chose_is_summed_in_segments(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Partial sums change the last bit of a float64 sum at most, seldom one of float32."""
    monkeypatch.setattr(slot_sums, "_SEGMENT", 16)
    grad, query, keys, indices = inputs(60, 5, 6, 2)
    indices[:45] = torch.tensor([2, 0])  # 45 slots each of keys 0 and 2; 1, 3 and 4 share the rest
    with memad_fast.use_backend("triton"):
        got = torch.ops.memad_fast.nearest_keys_backward_keys(grad, query, keys, indices, metric)
    expected = torch.ops.memad_fast.nearest_keys_backward_keys(grad, query, keys, indices, metric)
    torch.testing.assert_close(got, expected, rtol=2**-22, atol=1e-30)
    assert torch.equal(got[[1, 3, 4]], expected[[1, 3, 4]])


@pytest.mark.parametrize("length", [15, 16, 17, 31, 32, 33, 48])
def test_segments_leave_no_slot_out(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot_sums, "_SEGMENT", 16)
    for indices in (torch.tensor([3] * 5 + [1] * length + [2] * 16)[:, None], torch.full((length, 1), 4)):
        query = (2.0 ** torch.arange(len(indices)).remainder(20))[:, None]  # sums of which no rounding hides a slot
        assert_same_bits(torch.ones(len(indices), 1), query, torch.zeros(5, 1), indices, "ip")


def test_slots_are_added_one_after_the_other() -> None:
    """Large terms that cancel leave what their order and bracketing left of the small ones."""
    large, small = torch.full((10,), 2.0**53), torch.randn(30)
    for _ in range(5):
        grad = torch.cat([large, -large, small])[torch.randperm(50)][:, None]
        assert_same_bits(grad, torch.ones(50, 2), torch.zeros(1, 2), torch.zeros(50, 1, dtype=torch.int64), "ip")
        one_query = grad.T.contiguous(), torch.zeros(1, 2), torch.ones(1, 2)
        assert_same_bits(*one_query, torch.zeros(1, 50, dtype=torch.int64), "ip")


def test_slots_outside_the_keys_give_nothing() -> None:
    grad, query, keys, indices = inputs(8, 4, 5, 2)
    indices[:] = torch.tensor([-1, 4])
    indices[5:, 1] = torch.tensor([2**16, 2**32 + 1, 2**62])
    indices[3, 0] = 2
    query[0], grad[1] = torch.nan, torch.nan
    grad_query, grad_keys = assert_same_bits(grad, query, keys, indices, "l2")
    assert torch.count_nonzero(grad_query.abs().sum(dim=1)).item() == 1
    assert torch.count_nonzero(grad_keys.abs().sum(dim=1)).item() == 1


def test_a_zero_vector_has_no_cosine_gradient() -> None:
    grad, query, keys, indices = inputs(6, 3, 4, 1)
    query[2], keys[1] = 0.0, 0.0
    grad_query, grad_keys = assert_same_bits(grad, query, keys, indices, "cosine")
    assert not grad_query[2].any()
    assert not grad_keys[1].any()


@pytest.mark.parametrize("metric", METRICS)
def test_strided_and_huge_inputs(metric: str) -> None:
    """Every stride is read in place, a broadcast gradient too; 1e25 squared is beyond float32, not float64."""
    _, query, keys, indices = inputs(9, 5, 14, 2)
    query, keys = (1e25 * query)[:, ::2], (1e-25 * keys).T.contiguous().T[:, ::2]
    assert_same_bits(torch.tensor([[1e-10]]).expand(9, 2), query, keys, indices.T.contiguous().T, metric)


@pytest.mark.parametrize("metric", METRICS)
def test_nothing_to_add_gives_zeros(metric: str) -> None:
    grad_query, grad_keys = assert_same_bits(*inputs(0, 4, 3, 1), metric)
    assert grad_query.shape == (0, 3)
    assert torch.equal(grad_keys, torch.zeros(4, 3))
    assert_same_bits(*inputs(5, 4, 0, 2), metric)


@pytest.mark.parametrize("metric", METRICS)
def test_gradients_of_the_function_equal_the_references(metric: str) -> None:
    query, keys = torch.randn(7, 5), torch.randn(9, 5)
    query[3, 1] = torch.nan
    arguments = (torch.ones(7, 2), query, keys, memad_fast.nearest_keys(query, keys, 2, metric=metric)[1], metric)
    leaves = [x.double().requires_grad_() for x in (query, keys)]
    distances, _ = memad_fast.nearest_keys(*leaves, 2, metric=metric)
    expected = torch.autograd.grad(distances[~distances.isnan()].sum(), leaves)
    for got, want in zip(assert_same_bits(*arguments), expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)


def test_the_slots_of_each_row_stay_in_order() -> None:
    indices = torch.tensor([[2, 0], [2, -1], [0, 9], [2, 2]])
    slots, start = slot_sums._lists(indices, 3)
    assert start.tolist() == [1, 3, 3, 7]
    assert slots[1:7].tolist() == [1, 4, 0, 2, 6, 7]
