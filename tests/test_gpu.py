"""On a CUDA device: the reference gives the CPU's results there, and the CUDA kernels give the CPU kernels' results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import memad_fast

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

needs_cuda_backend = pytest.mark.skipif(
    not memad_fast.backends()["cuda"].available, reason="needs _C_cuda (MEMAD_FAST_BUILD_CUDA=1)"
)

CALLS: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "nearest_keys": (lambda q, k: memad_fast.nearest_keys(q, k, 3), (torch.randn(40, 32), torch.randn(100, 32))),
    "stcm_lookup": (memad_fast.stcm_lookup, (torch.randn(40, 32), torch.randn(100, 32), torch.randn(100, 8))),
    "bank_attention": (
        lambda q, m: memad_fast.bank_attention(q, m, threshold=0.01, shrink="hard"),
        (torch.randn(2, 4, 16, 24), torch.randn(4, 50, 24)),
    ),
    "gumbel_topk": (
        lambda q, m: memad_fast.gumbel_topk(q, m, 5, seed=7),
        (torch.randn(40, 32), torch.randn(100, 32)),
    ),
    "histogram_correction": (memad_fast.histogram_correction, (torch.rand(3, 1, 32, 32),)),
    "ssim_loss": (memad_fast.ssim_loss, (torch.rand(2, 1, 32, 32), torch.rand(2, 1, 32, 32))),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_reference_gives_the_same_on_the_gpu(name: str) -> None:
    call, inputs = CALLS[name]
    expected = call(*[value.double() for value in inputs])
    with memad_fast.use_backend("reference"):
        got = call(*[value.double().cuda() for value in inputs])
    for a, b in zip(_tensors(got), _tensors(expected), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-9, atol=1e-9)


def test_a_missing_kernel_is_named() -> None:
    with pytest.raises(memad_fast.BackendUnavailableError, match=r"nearest_keys"):
        memad_fast.nearest_keys(torch.randn(3, 4).cuda(), torch.randn(5, 4).cuda())


def _ring(size: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros(size, width), torch.zeros(size, 3), torch.zeros((), dtype=torch.int64)


@needs_cuda_backend
@pytest.mark.parametrize("width", [1, 7, 64, 513])
def test_cuda_ring_write_equals_the_cpus(width: int) -> None:
    cpu = _ring(10, width)
    gpu = tuple(part.cuda() for part in _ring(10, width))
    for count in (3, 0, 9, 25, 10, 1):
        keys, values = torch.randn(count, width), torch.randn(count, 3)
        memad_fast.fifo_write_(*cpu, keys, values)
        memad_fast.fifo_write_(*gpu, keys.cuda(), values.cuda())
        for a, b in zip(gpu, cpu, strict=True):
            assert torch.equal(a.cpu(), b)


@needs_cuda_backend
def test_cuda_ring_write_replays_in_a_graph() -> None:
    keys, values, cursor = (part.cuda() for part in _ring(10, 8))
    new_keys, new_values = torch.ones(4, 8).cuda(), torch.ones(4, 3).cuda()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        memad_fast.fifo_write_(keys, values, cursor, new_keys, new_values)
    expected = _ring(10, 8)
    for step in range(5):
        rows = torch.randn(4, 8)
        new_keys.copy_(rows)
        new_values.fill_(step)
        graph.replay()
        memad_fast.fifo_write_(*expected, rows, torch.full((4, 3), float(step)))
    for a, b in zip((keys, values, cursor), expected, strict=True):
        assert torch.equal(a.cpu(), b)


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)
