"""The gradients of gumbel_topk (memad_fast/ops/gumbel_topk.py has the contract).

With g the gradient of a read, h that of its scores, a_j = g · memory_j and w the weights of the read:

    chosen rows    d score_s  = h_s + (renormalized: w_s (a_s − c) / T;  softmax: w_s a_s / T),   c = Σ w a
                   d memory_s = w_s g
    all columns    d score_j  = softmax: −w_j c / T;  straight_through: w_j (a_j − c) / T, and d memory_j = w_j g
    both           d query = Σ d score_j memory_j,   d memory_j += d score_j query

Chosen rows cost gathers and, for the memory, sorted scatter sums (``slot_sums``). The dense part of "softmax" and
"straight_through" goes through blocks of rows with at most 2²³ scores, 32 MiB and as much for a, so that each of its
three or five products is made once, in float32 multiply-adds:

    score, a of a block  ──►  a row's largest score, Σ exp, Σ exp·a  ──►  d query of the block, d memory of all blocks
       _products                       _row_sums                          _query_gradient  _memory_gradient

A score becomes its weight where it is used. The rows of a block are shared out to ``splits`` sums of d memory, each in
the order of the rows; these are added in order. Nothing else is summed across programs: the same bits at every call.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memad_fast.kernels import architecture, gumbel_topk, slot_sums

_BLOCK_SCORES = 1 << 23
_ROWS = 64
_COLUMNS = 64
_DEPTH = 16
_LOWEST = tl.constexpr(-3.4028234663852886e38)


def gumbel_topk_backward(
    grad_read: Tensor,
    grad_scores: Tensor,
    query: Tensor,
    memory: Tensor,
    temperature: float,
    seed: Tensor | None,
    combine: str,
    indices: Tensor,
    scores: Tensor,
) -> tuple[Tensor, Tensor]:
    """The op on a GPU: (gradient of query, gradient of memory)."""
    grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
    rows, width = query.shape
    if rows == 0 or width == 0:
        return grad_query, torch.zeros_like(memory, memory_format=torch.contiguous_format)
    gradient = _Gradient(grad_read, grad_scores, query, memory, temperature, combine, indices, scores)
    if gradient.dense:
        grad_memory = _dense(gradient, seed, grad_query)
    else:
        gradient.chosen(0, rows, None)
        gradient.of_queries(memory, 0, rows, None, None, None, grad_query)
        grad_memory = gradient.of_chosen_memory()
    return grad_query, grad_memory.to(memory.dtype)


def _dense(gradient: _Gradient, seed: Tensor | None, grad_query: Tensor) -> Tensor:
    query, memory = gradient.query, gradient.memory
    (rows, width), columns = query.shape, memory.shape[0]
    on = architecture.architecture(query)
    config = architecture.fitting(gumbel_topk.CONFIGS, on, gumbel_topk.shared_bytes)
    block = min(max(_BLOCK_SCORES // columns // _ROWS, 1) * _ROWS, triton.cdiv(rows, _ROWS) * _ROWS)
    kept = query.new_empty((block, columns), dtype=torch.float32)
    values = torch.empty_like(kept) if gradient.through else None
    sums = query.new_empty((rows, 3), dtype=torch.float32)
    tiles = triton.cdiv(columns, _COLUMNS) * triton.cdiv(width, _COLUMNS)
    splits = min(triton.cdiv(2 * on.multiprocessors, tiles), block // _ROWS)
    partial = query.new_empty((splits, columns, width), dtype=torch.float32)
    # Float32 copies: of bfloat16 widened in registers, Triton 3.6 makes a TF32 product on sm_100, "ieee" or not.
    memory = memory.float()
    for first in range(0, rows, block):
        count = min(block, rows - first)
        gradient.products(first, count, seed, kept, values, config)
        _row_sums[(triton.cdiv(count, 4),)](
            kept, values, sums, first, count, columns, gradient.inverse, ROWS=4, COLUMNS=256
        )
        gradient.chosen(first, count, sums)
        gradient.of_queries(memory, first, count, kept, values, sums, grad_query)
        queries, upstream = query[first : first + count].float(), gradient.grad_read[first : first + count].float()
        split_rows = triton.cdiv(triton.cdiv(count, splits), _ROWS) * _ROWS
        _memory_gradient[(tiles * splits,)](
            kept, values, sums, queries, upstream, gradient.query_penalties, partial,
            first, count, columns, split_rows, tiles, gradient.inverse, *queries.stride(), *upstream.stride(),
            D=width, ROWS=_DEPTH, COLUMNS=_COLUMNS, DEPTH=_COLUMNS, num_warps=8,
        )  # fmt: skip
    return gradient.of_chosen_memory().add_(partial.sum(0))


class _Gradient:
    """What all parts of the gradient read, and the weights and score gradients of the chosen rows."""

    def __init__(
        self,
        grad_read: Tensor,
        grad_scores: Tensor,
        query: Tensor,
        memory: Tensor,
        temperature: float,
        combine: str,
        indices: Tensor,
        scores: Tensor,
    ) -> None:
        self.grad_read, self.grad_scores = grad_read, grad_scores.contiguous()
        self.query, self.memory = query, memory
        self.combine, self.inverse = combine, gumbel_topk.inverse_temperature(temperature)
        self.dense, self.through = combine in ("softmax", "straight_through"), combine == "straight_through"
        self.indices, self.scores = indices.contiguous(), scores.contiguous()
        self.rows, self.width = query.shape
        self.columns, self.k = memory.shape[0], indices.shape[1]
        self.query_penalties = gumbel_topk.penalties(query)
        self.memory_penalties = gumbel_topk.penalties(memory)
        self.slot_weights = torch.empty_like(self.grad_scores)
        self.slot_grads = torch.empty_like(self.grad_scores)

    def products(
        self,
        first: int,
        count: int,
        seed: Tensor | None,
        kept: Tensor,
        values: Tensor | None,
        config: gumbel_topk.Config,
    ) -> None:
        """Scores of a block of rows to ``kept`` and, if it is asked for, g · memory to ``values``."""
        grid = (triton.cdiv(count, config.rows) * triton.cdiv(self.columns, config.columns),)
        _products[grid](
            self.query, self.memory, self.grad_read, self.memory_penalties, seed, kept, values,
            first, self.rows, self.columns, *self.query.stride(), *self.memory.stride(), *self.grad_read.stride(),
            D=self.width, ROWS=config.rows, COLUMNS=config.columns, DEPTH=config.depth,
            num_warps=config.warps, num_stages=1, enable_fp_fusion=False,
        )  # fmt: skip

    def chosen(self, first: int, count: int, sums: Tensor | None) -> None:
        """Weights and score gradients of the chosen rows of a block of rows, and c of "softmax" to ``sums``."""
        _chosen[(triton.cdiv(count, 8),)](
            self.grad_read, self.grad_scores, self.memory, self.indices, self.scores, sums,
            self.slot_weights, self.slot_grads, first, first + count, self.k, self.inverse,
            *self.grad_read.stride(), *self.memory.stride(),
            D=self.width, COMBINE=self.combine, ROWS=8, DEPTH=32,
        )  # fmt: skip

    def of_queries(
        self,
        memory: Tensor,
        first: int,
        count: int,
        kept: Tensor | None,
        values: Tensor | None,
        sums: Tensor | None,
        result: Tensor,
    ) -> None:
        """The gradient of a block of queries."""
        depths = triton.cdiv(self.width, _COLUMNS)
        _query_gradient[(triton.cdiv(count, _ROWS) * depths,)](
            memory, self.indices, self.slot_grads, self.query_penalties, self.memory_penalties,
            kept, values, sums, result, first, first + count, self.columns, self.k, self.inverse, *memory.stride(),
            D=self.width, ROWS=_ROWS, COLUMNS=_DEPTH, DEPTH=_COLUMNS,
        )  # fmt: skip

    def of_chosen_memory(self) -> Tensor:
        """The float32 gradient of the memory from the chosen rows."""
        total = self._scattered(self.slot_grads, self.query)
        return total if self.through else total.add_(self._scattered(self.slot_weights, self.grad_read))

    def _scattered(self, weights: Tensor, rows: Tensor) -> Tensor:
        total = self.memory.new_empty(self.memory.shape, dtype=torch.float32)
        slot_sums.sum_by_row("ip", weights, self.memory, rows, self.k, self.indices, total)
        return total


@triton.jit(do_not_specialize=["first", "rows", "columns"])
def _products(
    query, memory, grad, penalties, seed_at, kept, values, first, rows, columns,
    query_row, query_column, memory_row, memory_column, grad_row, grad_column,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(columns, COLUMNS)
    block_row = (tl.program_id(0) // tiles).to(tl.int64) * ROWS
    first_row, first_column = first + block_row, tl.program_id(0) % tiles * COLUMNS
    seed = None if seed_at is None else tl.load(seed_at)
    scores = gumbel_topk.tile_scores(
        query, memory, penalties, seed, first_row, first_column, rows, columns,
        query_row, query_column, memory_row, memory_column, D, ROWS, COLUMNS, DEPTH,
    )  # fmt: skip
    r, column = tl.arange(0, ROWS), gumbel_topk.philox.tile_columns(first_column, COLUMNS)
    row = first_row + r
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = (block_row + r)[:, None] * columns + column[None, :]
    tl.store(kept + at, tl.where(scores == scores, scores, float("-inf")), mask=inside)
    if values is not None:
        value = gumbel_topk.product(
            grad, memory, row, column, rows, columns, grad_row, grad_column, memory_row, memory_column, D, DEPTH
        )
        usable = tl.load(penalties + column, mask=column < columns, other=0.0) == 0.0
        tl.store(values + at, tl.where(usable[None, :], value, 0.0), mask=inside)


@triton.jit(do_not_specialize=["first", "rows", "columns"])
def _row_sums(kept, values, sums, first, rows, columns, inverse, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of each row of a block: the largest score, 1 / Σ exp((score − largest) / T), and c where there are values."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    largest = tl.full([ROWS], _LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS], tl.float32)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = (r < rows)[:, None] & (column < columns)[None, :]
        at = r[:, None] * columns + column[None, :]
        scores = tl.load(kept + at, mask=inside, other=float("-inf"))
        higher = tl.maximum(largest, tl.max(scores, axis=1))
        shrink = tl.exp((largest - higher) * inverse)
        weights = tl.exp((scores - higher[:, None]) * inverse)
        total = total * shrink + tl.sum(weights, axis=1)
        if values is not None:
            weighted = weighted * shrink + tl.sum(weights * tl.load(values + at, mask=inside, other=0.0), axis=1)
        largest = higher
    share = tl.where(total == 0.0, 0.0, 1.0 / total)
    to = sums + (first + r) * 3
    tl.store(to, largest, mask=r < rows)
    tl.store(to + 1, share, mask=r < rows)
    tl.store(to + 2, weighted * share, mask=r < rows)


@triton.jit
def _weight(scores, largest, share, inverse):
    return tl.exp((scores - largest) * inverse) * share


@triton.jit(do_not_specialize=["first", "rows", "k"])
def _chosen(
    grad, grad_scores, memory, indices, scores, sums, slot_weights, slot_grads, first, rows, k, inverse,
    grad_row, grad_column, memory_row, memory_column,
    D: tl.constexpr, COMBINE: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    row = first + tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    kept = row < rows
    share = tl.full([ROWS], 1.0, tl.float32)
    largest = tl.zeros([ROWS], tl.float32)
    if COMBINE == "softmax":
        largest = tl.load(sums + row * 3, mask=kept, other=0.0)
        share = tl.load(sums + row * 3 + 1, mask=kept, other=0.0)
    elif COMBINE == "renormalized" or COMBINE == "mean":
        largest = tl.load(scores + row * k, mask=kept, other=0.0)
        total = tl.zeros([ROWS], tl.float32)
        for slot in range(0, k):
            found = kept & (tl.load(indices + row * k + slot, mask=kept, other=-1) >= 0)
            if COMBINE == "mean":
                total += tl.where(found, 1.0, 0.0)
            else:
                score = tl.load(scores + row * k + slot, mask=found, other=0.0)
                total += tl.where(found, _weight(score, largest, share, inverse), 0.0)
        share = 1.0 / total

    centre = tl.zeros([ROWS], tl.float32)
    for slot in range(0, k):
        at = row * k + slot
        column = tl.load(indices + at, mask=kept, other=-1)
        found = column >= 0
        weight = tl.zeros([ROWS], tl.float32)
        value = tl.zeros([ROWS], tl.float32)
        if COMBINE == "sum" or COMBINE == "mean":
            weight = share
        elif COMBINE != "straight_through":
            weight = _weight(tl.load(scores + at, mask=found, other=0.0), largest, share, inverse)
            for start in range(0, D, DEPTH):
                d = start + tl.arange(0, DEPTH)
                inside = found[:, None] & (d < D)[None, :]
                g = tl.load(grad + row[:, None] * grad_row + d[None, :] * grad_column, mask=inside, other=0.0)
                m = tl.load(memory + column[:, None] * memory_row + d[None, :] * memory_column, mask=inside, other=0.0)
                value += tl.sum(g.to(tl.float32) * m.to(tl.float32), axis=1)
            centre += tl.where(found, weight * value, 0.0)
        tl.store(slot_weights + at, tl.where(found, weight, 0.0), mask=kept)
        tl.store(slot_grads + at, value, mask=kept)
    tl.debug_barrier()  # each slot is read by more threads than wrote it

    for slot in range(0, k):
        at = row * k + slot
        found = tl.load(indices + at, mask=kept, other=-1) >= 0
        grad_score = tl.load(grad_scores + at, mask=found, other=0.0)
        if COMBINE == "softmax" or COMBINE == "renormalized":
            weight, value = (
                tl.load(slot_weights + at, mask=found, other=0.0),
                tl.load(slot_grads + at, mask=found, other=0.0),
            )
            if COMBINE == "renormalized":
                value -= centre
            grad_score += weight * value * inverse
        tl.debug_barrier()
        tl.store(slot_grads + at, tl.where(found, grad_score, 0.0), mask=kept)
    if COMBINE == "softmax":
        tl.store(sums + row * 3 + 2, centre, mask=kept)


@triton.jit
def _dense_tile(kept, values, sums, r, first, column, rows, columns, inverse):
    """Weights and score gradients of all columns, for a tile of a block."""
    row = first + r
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = r[:, None] * columns + column[None, :]
    largest = tl.load(sums + row * 3, mask=row < rows, other=0.0)
    share = tl.load(sums + row * 3 + 1, mask=row < rows, other=0.0)
    centre = tl.load(sums + row * 3 + 2, mask=row < rows, other=0.0)
    scores = tl.load(kept + at, mask=inside, other=float("-inf"))
    weights = _weight(scores, largest[:, None], share[:, None], inverse)
    value = 0.0
    if values is not None:
        value = tl.load(values + at, mask=inside, other=0.0)
    return weights, weights * (value - centre[:, None]) * inverse


@triton.jit(do_not_specialize=["first", "rows", "columns", "k"])
def _query_gradient(
    memory, indices, slot_grads, query_penalties, memory_penalties, kept, values, sums, result,
    first, rows, columns, k, inverse, memory_row, memory_column,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    depths: tl.constexpr = (D + DEPTH - 1) // DEPTH
    r = (tl.program_id(0) // depths).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row = first + r
    d = tl.program_id(0) % depths * DEPTH + tl.arange(0, DEPTH)
    total = tl.zeros([ROWS, DEPTH], tl.float32)
    if kept is not None:
        for start in range(0, columns, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            _, grads = _dense_tile(kept, values, sums, r, first, column, rows, columns, inverse)
            usable = tl.load(memory_penalties + column, mask=column < columns, other=-1.0) == 0.0
            at = column.to(tl.int64)[:, None] * memory_row + d[None, :] * memory_column
            items = tl.load(memory + at, mask=usable[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
            total = tl.dot(grads, items, total, input_precision="ieee")
    for slot in range(0, k):
        column = tl.load(indices + row * k + slot, mask=row < rows, other=-1)
        grad = tl.load(slot_grads + row * k + slot, mask=row < rows, other=0.0)
        at = column[:, None] * memory_row + d[None, :] * memory_column
        items = tl.load(memory + at, mask=(column >= 0)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        total += grad[:, None] * items
    usable = tl.load(query_penalties + row, mask=row < rows, other=0.0) == 0.0
    total = tl.where(usable[:, None], total, 0.0).to(result.dtype.element_ty)
    tl.store(result + row[:, None] * D + d[None, :], total, mask=(row < rows)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["first", "count", "columns", "split_rows", "tiles"])
def _memory_gradient(
    kept, values, sums, query, grad, query_penalties, partial, first, count, columns, split_rows, tiles, inverse,
    query_row, query_column, grad_row, grad_column,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """What a block adds to d memory: each program a tile of it, from its share of the rows."""
    depths: tl.constexpr = (D + DEPTH - 1) // DEPTH
    split, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    column = tile // depths * COLUMNS + tl.arange(0, COLUMNS)
    d = tile % depths * DEPTH + tl.arange(0, DEPTH)
    to = partial + (split.to(tl.int64) * columns + column[:, None]) * D + d[None, :]
    inside = (column < columns)[:, None] & (d < D)[None, :]
    total = tl.load(to, mask=inside & (first > 0), other=0.0)
    rows = first + tl.minimum(count, (split + 1) * split_rows)
    for start in range(split * split_rows, tl.minimum(count, (split + 1) * split_rows), ROWS):
        r = start + tl.arange(0, ROWS).to(tl.int64)
        row = first + r
        weights, grads = _dense_tile(kept, values, sums, r, first, column, rows, columns, inverse)
        usable = tl.load(query_penalties + row, mask=row < rows, other=-1.0) == 0.0
        loaded = usable[:, None] & (d < D)[None, :]
        queries = tl.load(query + r[:, None] * query_row + d[None, :] * query_column, mask=loaded, other=0.0)
        grads = tl.where(usable[:, None], grads, 0.0)
        total = tl.dot(tl.trans(grads), queries, total, input_precision="ieee")
        if values is not None:
            upstream = tl.load(grad + r[:, None] * grad_row + d[None, :] * grad_column, mask=loaded, other=0.0)
            weights = tl.where(usable[:, None], weights, 0.0)
            total = tl.dot(tl.trans(weights), upstream, total, input_precision="ieee")
    tl.store(to, total, mask=inside)
