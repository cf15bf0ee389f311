"""A peer of nearest_keys that is not exact: product and argmin in one Triton kernel, in TF32.

What flash-kmeans' assignment step does: no [N, M] matrix, float32 rows rounded to the 10 bits of TF32 on tensor cores.
On near ties it names another key than float32 would; the table says how often.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

QUERIES, KEYS, DEPTH = 128, 128, 32


@triton.jit
def _assign(
    query, keys, half_squares, best, index, queries, rows, rows_of_split,
    DIM: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The smallest |key|^2/2 - query.key of each query of a block, among the keys of a split."""
    n = tl.program_id(0).to(tl.int64) * QUERIES + tl.arange(0, QUERIES)
    split = tl.program_id(1).to(tl.int64)
    smallest = tl.full((QUERIES,), float("inf"), tl.float32)
    where = tl.zeros((QUERIES,), tl.int64)
    end = tl.minimum((split + 1) * rows_of_split, rows)
    for first in range(split * rows_of_split, end, KEYS):
        m = first + tl.arange(0, KEYS)
        product = tl.zeros((QUERIES, KEYS), tl.float32)
        for depth in range(0, DIM, DEPTH):
            d = depth + tl.arange(0, DEPTH)
            q = tl.load(query + n[:, None] * DIM + d[None, :], (n < queries)[:, None] & (d < DIM)[None, :], 0.0)
            k = tl.load(keys + m[None, :] * DIM + d[:, None], (m < rows)[None, :] & (d < DIM)[:, None], 0.0)
            product = tl.dot(q, k, product, input_precision="tf32")
        score = tl.load(half_squares + m, m < end, float("inf"))[None, :] - product
        low, at = tl.min(score, 1, return_indices=True)
        where = tl.where(low < smallest, first + at, where)
        smallest = tl.minimum(low, smallest)
    tl.store(best + split * queries + n, smallest, n < queries)
    tl.store(index + split * queries + n, where, n < queries)


def assign(query: Tensor, keys: Tensor, half_squares: Tensor) -> tuple[Tensor, Tensor]:
    """(squared distances [N, 1], indices [N, 1]) of contiguous float32 rows."""
    (count, dim), rows = query.shape, len(keys)
    blocks = triton.cdiv(count, QUERIES)
    # So many splits of the keys that every multiprocessor has work.
    wanted = max(1, 2 * torch.cuda.get_device_properties(query.device).multi_processor_count // blocks)
    rows_of_split = KEYS * triton.cdiv(triton.cdiv(rows, wanted), KEYS)
    splits = triton.cdiv(rows, rows_of_split)
    best = query.new_empty(splits, count)
    index = torch.empty(splits, count, dtype=torch.int64, device=query.device)
    _assign[(blocks, splits)](
        query, keys, half_squares, best, index, count, rows, rows_of_split, dim, QUERIES, KEYS, DEPTH,
        num_warps=8, num_stages=3,
    )  # fmt: skip
    scores, split = best.min(dim=0)
    distances = 2.0 * scores + query.square().sum(dim=1)
    return distances[:, None], index.gather(0, split[None])[0][:, None]
