"""Small calls of every CUDA C++ kernel, ending inside tiles, for ``make gpu-sanitize``: memcheck and racecheck.

Under compute-sanitizer a kernel takes up to a hundred times as long, and so does every kernel of torch: the calls are
few. What they give is compared with the CPU's, so that a checked kernel is known to have run.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from calls import Call, outputs_and_gradients, random_rows, write_ring
from torch import Tensor
from where import DEVICE, DRY_RUN, HAS_GPU, has_kernels

import memad_fast

BACKEND = "cuda" if HAS_GPU else DRY_RUN or "cuda"


def _overwritten(query: Tensor, keys: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    prepared = memad_fast.prepare_keys(keys.clone()).overwrite_(3, new)
    return memad_fast.nearest_keys(query, prepared, 2)


def _search(count: int, rows: int, dim: int, k: int, metric: str) -> Call:
    function = partial(memad_fast.nearest_keys, k=k, metric=metric)
    return Call(("nearest_keys",), function, random_rows((count, dim), (rows, dim)), leaves=(0, 1))


def _not_finite() -> tuple[Tensor, Tensor]:
    query, keys = torch.randn(9, 64), torch.randn(140, 64)
    query[4], keys[0], keys[139, 3] = torch.nan, torch.inf, torch.nan
    return query, keys


# Sizes end one beyond a tile, or one before.
CALLS = {
    "fifo_write_": Call(
        ("fifo_write_",),
        write_ring,
        lambda: (*random_rows((33, 65), (33, 7))(), torch.tensor(30), *random_rows((40, 65), (40, 7))()),
    ),
    "nearest_keys of one": _search(1, 1, 1, 1, "l2"),
    "nearest_keys": _search(129, 257, 65, 1, "l2"),
    "nearest_keys k=3": _search(127, 129, 64, 3, "ip"),
    "nearest_keys of few queries": _search(2, 1025, 33, 1, "cosine"),
    "nearest_keys of equal rows": Call(
        ("nearest_keys",), memad_fast.nearest_keys, lambda: (torch.randn(5, 64), torch.ones(400, 64))
    ),
    "nearest_keys of rows that are not finite": Call(("nearest_keys",), memad_fast.nearest_keys, _not_finite),
    "nearest_keys of prepared keys": Call(
        ("nearest_keys", "prepare_keys", "prepare_keys_rows_"), _overwritten, random_rows((33, 65), (129, 65), (9, 65))
    ),
    "stcm_lookup": Call(
        ("stcm_lookup",), memad_fast.stcm_lookup, random_rows((33, 65), (129, 65), (129, 7)), leaves=(0, 1, 2)
    ),
    "histogram_correction": Call(
        ("histogram_correction",), memad_fast.histogram_correction, lambda: (torch.randn(3, 5003).abs(),), leaves=(0,)
    ),
    "histogram_correction of a large image": Call(
        ("histogram_correction",), memad_fast.histogram_correction, lambda: (torch.randn(1, 300_007).abs(),)
    ),
    "ssim_map": Call(("ssim_map",), memad_fast.ssim_map, lambda: tuple(torch.rand(2, 1, 2, 35, 67)), leaves=(0, 1)),
    "bank_attention": Call(
        ("bank_attention",),
        partial(memad_fast.bank_attention, threshold=0.02),
        random_rows((2, 3, 33, 65), (3, 50, 65)),
        leaves=(0, 1),
    ),
    "gumbel_topk": Call(
        ("gumbel_topk",), partial(memad_fast.gumbel_topk, k=5, seed=3), random_rows((33, 65), (129, 65)), leaves=(0, 1)
    ),
}
IS_EXACT = ("fifo_write_", "nearest_keys", "stcm_lookup")


@pytest.mark.parametrize("name", CALLS)
def test_it_gives_the_cpus_results(name: str) -> None:
    call = CALLS[name]
    if not has_kernels(BACKEND, *call.ops):
        pytest.skip(f"{BACKEND} has no kernel for one of {', '.join(call.ops)}")
    inputs = call.inputs()
    with memad_fast.use_backend("cpu"):
        expected = outputs_and_gradients(call, tuple(value.clone() for value in inputs))
    with memad_fast.use_backend(BACKEND):
        got = outputs_and_gradients(call, tuple(value.clone().to(DEVICE) for value in inputs))
    results = len(expected) - len(call.leaves)
    for at, (a, b) in enumerate(zip(got, expected, strict=True)):
        tolerance = 0.0 if name.startswith(IS_EXACT) and at < results else 1e-4
        largest = max(1.0, b[b.isfinite()].abs().max().item()) if b.is_floating_point() else 0.0
        torch.testing.assert_close(a.cpu(), b, rtol=tolerance, atol=tolerance * largest, equal_nan=True)
