"""Top-k memory read with Gumbel noise (memad_fast/ops/gumbel_topk.py has the contract).

    score_ij = query_i · memory_j + g(seed, i, j),   the k largest of a row choose the memory rows of its read
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from memad_fast.kernels import architecture, philox

_NONE = tl.constexpr(-(2**63))  # a key below that of every score
_LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def key_of(scores, columns):
    """int64 keys whose order is that of (score, lower column): the order-preserving bits of the score, then −column."""
    bits = (scores + 0.0).to(tl.int32, bitcast=True)  # + 0: both zeros are one score
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - columns).to(tl.int64)


@triton.jit
def score_of(keys):
    ordered = (keys >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def column_of(keys):
    return 0x7FFFFFFF - keys.to(tl.int32)


@triton.jit(do_not_specialize=["rows"])
def _penalties(
    matrix, penalties, rows, row_stride, column_stride, D: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr
):
    """0 for each row whose values are all finite, −inf for the others."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    doubt = tl.zeros([ROWS], tl.float32)
    for start in range(0, D, DEPTH):
        d = start + tl.arange(0, DEPTH)
        inside = (row < rows)[:, None] & (d < D)[None, :]
        values = tl.load(matrix + row[:, None] * row_stride + d[None, :] * column_stride, mask=inside, other=0.0)
        doubt += tl.sum((values - values).to(tl.float32), axis=1)  # 0 or NaN
    tl.store(penalties + row, tl.where(doubt == 0.0, 0.0, float("-inf")), mask=row < rows)


@triton.jit
def product(
    left, right, row, column, rows, columns, left_row, left_column, right_row, right_column,
    D: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """[rows of left] · [rows of right], each a chain of multiply-adds along D."""
    total = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    for start in tl.static_range(0, D, DEPTH):
        d = start + tl.arange(0, DEPTH)
        a = tl.load(
            left + row[:, None] * left_row + d[None, :] * left_column,
            mask=(row < rows)[:, None] & (d < D)[None, :], other=0.0,
        )  # fmt: skip
        b = tl.load(
            right + column[None, :].to(tl.int64) * right_row + d[:, None] * right_column,
            mask=(column < columns)[None, :] & (d < D)[:, None], other=0.0,
        )  # fmt: skip
        total = tl.dot(a, b, total, input_precision="ieee")
    return total


@triton.jit
def _keep_best(
    slots, count, seed, first_row, k,
    K: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Leaves the K largest keys of each row in its first slots, in descending order; returns the k-th."""
    tl.debug_barrier()  # the slots were written by other threads of this program
    if seed is not None:
        for start in range(0, tl.max(count), CHUNK):
            slot = start + tl.arange(0, CHUNK)[None, :]
            raw = (slot >= K) & (slot < count[:, None])
            keys = tl.load(slots + slot, mask=raw, other=0)
            columns = column_of(keys)
            noise = philox.gumbel(philox.column_words(seed, first_row, columns, ROWS))
            tl.store(slots + slot, key_of(score_of(keys) + noise, columns), mask=raw)
        tl.debug_barrier()
    slot = tl.arange(0, SLOTS)[None, :]
    best = tl.topk(tl.load(slots + slot, mask=slot < count[:, None], other=_NONE), K)
    slot = tl.arange(0, K)[None, :]
    tl.debug_barrier()
    tl.store(slots + slot, best)
    tl.debug_barrier()
    return tl.load(tl.reshape(slots, [ROWS]) + k - 1)


@triton.jit(do_not_specialize=["rows", "columns", "run_tiles", "runs", "k"])
def _select(
    query, memory, penalties, seed_at, keys, slots, rows, columns, run_tiles, runs, k,
    query_row, query_column, memory_row, memory_column,
    D: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SLOTS: tl.constexpr,
    CHUNK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    r = tl.arange(0, ROWS)
    slots = slots + (tl.program_id(0) * ROWS + r)[:, None] * SLOTS
    seed = loaded(seed_at)
    tiles = tl.cdiv(columns, COLUMNS)
    none = tl.full([ROWS, K], _NONE, tl.int64)
    for task in range(tl.program_id(0), tl.cdiv(rows, ROWS) * runs, tl.num_programs(0)):
        run = task % runs
        first_row = (task // runs).to(tl.int64) * ROWS
        row = first_row + r
        tl.store(slots + tl.arange(0, K)[None, :], none)
        limit = tl.full([ROWS], float("-inf"), tl.float32)
        count = tl.full([ROWS], K, tl.int32)
        last = tl.minimum((run + 1) * run_tiles, tiles) - 1
        for tile in range(run * run_tiles, last + 1):
            column = philox.tile_columns(tile * COLUMNS, COLUMNS)
            scores = product(
                query, memory, row, column, rows, columns, query_row, query_column, memory_row, memory_column,
                D, DEPTH,
            )  # fmt: skip
            scores += tl.load(penalties + column, mask=column < columns, other=float("-inf"))[None, :]
            if seed is not None:
                words = philox.tile_words(seed, first_row, tile * COLUMNS, ROWS, COLUMNS)
                chosen = philox.may_reach(scores, words, limit[:, None])
            else:
                chosen = scores > limit[:, None]
            ahead = tl.cumsum(chosen.to(tl.int32), axis=1)
            tl.store(slots + count[:, None] + ahead - 1, key_of(scores, column[None, :]), mask=chosen)
            count += tl.sum(chosen.to(tl.int32), axis=1)
            if (tl.max(count) > SLOTS - COLUMNS) | (tile == last):
                kth = _keep_best(slots, count, seed, first_row, k, K, ROWS, SLOTS, CHUNK)
                if seed is not None:
                    limit = tl.where(kth == _NONE, float("-inf"), philox.floor(score_of(kth)))
                else:
                    limit = tl.where(kth == _NONE, float("-inf"), score_of(kth))
                count = tl.full([ROWS], K, tl.int32)
                tl.debug_barrier()
        slot = tl.arange(0, K)[None, :]
        at = (row[:, None] * runs + run) * k + slot
        best = tl.load(slots + slot)
        tl.store(keys + at, best, mask=(row < rows)[:, None] & (slot < k))
        tl.debug_barrier()


@triton.jit
def tile_scores(
    query, memory, penalties, seed, first_row, first_column, rows, columns,
    query_row, query_column, memory_row, memory_column,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """All scores of a tile, noise included; −inf or NaN for what cannot be chosen."""
    row, column = first_row + tl.arange(0, ROWS), philox.tile_columns(first_column, COLUMNS)
    scores = product(
        query, memory, row, column, rows, columns, query_row, query_column, memory_row, memory_column, D, DEPTH
    )
    if seed is not None:
        scores += philox.gumbel(philox.tile_words(seed, first_row, first_column, ROWS, COLUMNS))
    return scores + tl.load(penalties + column, mask=column < columns, other=float("-inf"))[None, :]


@triton.jit
def loaded(seed_at):
    if seed_at is None:
        return None
    else:
        return tl.load(seed_at)


@triton.jit(do_not_specialize=["rows", "columns", "first_row"])
def _all_keys(
    query, memory, penalties, seed_at, keys, first_row, rows, columns,
    query_row, query_column, memory_row, memory_column,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Keys of all scores of the rows from first_row, for more slots than ``_select`` sorts."""
    tiles = tl.cdiv(columns, COLUMNS)
    block_row = tl.program_id(0) // tiles * ROWS
    first_column = tl.program_id(0) % tiles * COLUMNS
    scores = tile_scores(
        query, memory, penalties, loaded(seed_at), first_row + block_row.to(tl.int64), first_column, rows, columns,
        query_row, query_column, memory_row, memory_column, D, ROWS, COLUMNS, DEPTH,
    )  # fmt: skip
    r, column = block_row + tl.arange(0, ROWS), philox.tile_columns(first_column, COLUMNS)
    found = tl.where(scores > float("-inf"), key_of(scores, column[None, :]), _NONE)
    at = keys + r.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(at, found, mask=(first_row + r < rows)[:, None] & (column < columns)[None, :])


@triton.jit(do_not_specialize=["rows", "offered", "k"])
def _merge_runs(
    offered_keys, keys, rows, offered, k, K: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """The k best of the ``offered`` keys of each row."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    best = tl.full([ROWS, K], _NONE, tl.int64)
    for start in range(0, offered, WIDTH):
        at = start + tl.arange(0, WIDTH)[None, :]
        more = tl.load(offered_keys + row * offered + at, mask=(row < rows) & (at < offered), other=_NONE)
        best = tl.topk(tl.reshape(tl.join(best, tl.topk(more, K)), [ROWS, 2 * K]), K)
    slot = tl.arange(0, K)[None, :]
    tl.store(keys + row * k + slot, best, mask=(row < rows) & (slot < k))


@triton.jit(do_not_specialize=["rows", "columns", "segments"])
def _softmax_parts(
    query, memory, penalties, seed_at, parts, rows, columns, segments, inverse,
    query_row, query_column, memory_row, memory_column,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """Of each row and segment of columns: the largest score and the sum of exp((score − largest) / T)."""
    segment = tl.program_id(0) % segments
    first_row = (tl.program_id(0) // segments).to(tl.int64) * ROWS
    seed = loaded(seed_at)
    largest = tl.full([ROWS], _LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for first_column in range(segment * SEGMENT, tl.minimum((segment + 1) * SEGMENT, columns), COLUMNS):
        scores = tile_scores(
            query, memory, penalties, seed, first_row, first_column, rows, columns,
            query_row, query_column, memory_row, memory_column, D, ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
        scores = tl.where(scores == scores, scores, float("-inf"))
        higher = tl.maximum(largest, tl.max(scores, axis=1))
        total = total * tl.exp((largest - higher) * inverse)
        total += tl.sum(tl.exp((scores - higher[:, None]) * inverse), axis=1)
        largest = higher
    row = first_row + tl.arange(0, ROWS)
    at = parts + (row * segments + segment) * 2
    tl.store(at, largest, mask=row < rows)
    tl.store(at + 1, total, mask=row < rows)


@triton.jit
def softmax_total(parts, row, rows, segments, top, inverse):
    """Sum of exp((score − top) / T) over all columns."""
    total = tl.zeros_like(top)
    for segment in range(0, segments):
        at = parts + (row * segments + segment) * 2
        largest = tl.load(at, mask=row < rows, other=0.0)
        total += tl.load(at + 1, mask=row < rows, other=0.0) * tl.exp((largest - top) * inverse)
    return total


@triton.jit(do_not_specialize=["rows", "k", "segments"])
def _read(
    keys, memory, query_penalties, parts, read, indices, scores, rows, k, segments, inverse,
    memory_row, memory_column,
    D: tl.constexpr, COMBINE: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    depths = tl.cdiv(D, DEPTH) if D > 0 else 1
    row = (tl.program_id(0) // depths).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(0) % depths * DEPTH + tl.arange(0, DEPTH)
    usable = tl.load(query_penalties + row, mask=row < rows, other=0.0) == 0.0
    top = score_of(tl.load(keys + row * k, mask=row < rows, other=0))

    share = tl.full([ROWS], 1.0, tl.float32)
    if COMBINE == "softmax":
        share = softmax_total(parts, row, rows, segments, top, inverse)
    elif COMBINE != "sum":
        share = tl.zeros([ROWS], tl.float32)
        for slot in range(0, k):
            key = tl.load(keys + row * k + slot, mask=row < rows, other=_NONE)
            weight = 1.0 if COMBINE == "mean" else tl.exp((score_of(key) - top) * inverse)
            share += tl.where(key != _NONE, weight, 0.0)

    total = tl.zeros([ROWS, DEPTH], tl.float32)
    for slot in range(0, k):
        key = tl.load(keys + row * k + slot, mask=row < rows, other=_NONE)
        found = key != _NONE
        score, column = score_of(key), column_of(key)
        weight = 1.0 if (COMBINE == "sum") | (COMBINE == "mean") else tl.exp((score - top) * inverse)
        weight = tl.where(found, weight / share, 0.0)
        at = memory + column.to(tl.int64)[:, None] * memory_row + d[None, :] * memory_column
        total += weight[:, None] * tl.load(at, mask=found[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        kept = (row < rows) & (tl.program_id(0) % depths == 0)
        tl.store(indices + row * k + slot, tl.where(found & usable, column.to(tl.int64), -1), mask=kept)
        tl.store(scores + row * k + slot, tl.where(found & usable, score, float("nan")), mask=kept)
    total = tl.where(usable[:, None], total, float("nan"))
    at = read + row[:, None] * D + d[None, :]
    tl.store(at, total.to(read.dtype.element_ty), mask=(row < rows)[:, None] & (d < D)[None, :])


@dataclass(frozen=True)
class _Config:
    """A tile of queries times memory, in the order of what matters to speed."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def shared_bytes(self, width: int) -> int:
        """What a block of _select needs."""
        return 0


_SLOTS = 128  # kept and awaited keys of a row in _select; it sorts them together
_CHUNK = 16
_SELECTED = 64  # most slots of _select
_SEGMENT = 512
_ALL_KEYS = 1 << 23  # most keys of _all_keys at once: 64 MiB
_BLOCKS = 2

_CONFIGS = {"any": (_Config(64, 64, 32, 4, 1),), "interpreter": (_Config(16, 64, 64, 1, 1),)}


def gumbel_topk(
    query: Tensor, memory: Tensor, k: int, temperature: float, seed: Tensor | None, combine: str
) -> tuple[Tensor, Tensor, Tensor]:
    rows, width = query.shape
    columns = memory.shape[0]
    read = torch.empty_like(query, memory_format=torch.contiguous_format)
    indices = query.new_empty((rows, k), dtype=torch.int64)
    scores = query.new_empty((rows, k), dtype=torch.float32)
    if rows == 0:
        return read, indices, scores
    on = architecture.architecture(query)
    config = architecture.fitting(_CONFIGS, on, lambda config: config.shared_bytes(width))
    product = _Product(query, memory, penalties(memory), seed, config)
    keys = product.best_keys(k, on.multiprocessors * _BLOCKS)
    inverse = inverse_temperature(temperature)
    parts = product.softmax_parts(inverse) if combine == "softmax" else None
    grid = (triton.cdiv(rows, 16) * max(1, triton.cdiv(width, 64)),)
    _read[grid](
        keys, memory, penalties(query), parts, read, indices, scores,
        rows, k, triton.cdiv(columns, _SEGMENT), inverse, *memory.stride(),
        D=width, COMBINE=combine, ROWS=16, DEPTH=64,
    )  # fmt: skip
    return read, indices, scores


def inverse_temperature(temperature: float) -> float:
    """1 / temperature in float32, kept off 0 and infinity so that its product with a score gap is never 0 · ∞."""
    limits = torch.finfo(torch.float32)
    return min(max(1.0 / temperature, limits.tiny), limits.max)


def penalties(matrix: Tensor) -> Tensor:
    result = matrix.new_empty(matrix.shape[0], dtype=torch.float32)
    grid = (triton.cdiv(matrix.shape[0], 32),)
    _penalties[grid](matrix, result, matrix.shape[0], *matrix.stride(), D=matrix.shape[1], ROWS=32, DEPTH=64)
    return result


class _Product:
    """query · memory + noise, and what is made of it tile by tile."""

    def __init__(self, query: Tensor, memory: Tensor, memory_penalties: Tensor, seed: Tensor | None, config: _Config):
        self.rows, width = query.shape
        self.columns = memory.shape[0]
        self.query, self.config = query, config
        self.inputs = (query, memory, memory_penalties, seed)
        self.strides = (*query.stride(), *memory.stride())
        self.blocks = triton.cdiv(self.rows, config.rows)
        self.tiles = triton.cdiv(self.columns, config.columns)
        self.constants = {
            "D": width, "ROWS": config.rows, "COLUMNS": config.columns, "DEPTH": config.depth,
            "num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": False,
        }  # fmt: skip

    def best_keys(self, k: int, programs: int) -> Tensor:
        """The keys of the k best of each row, best first."""
        if k > _SELECTED:
            return self._sorted_keys(k)
        K = triton.next_power_of_2(k)
        runs = min(self.tiles, triton.cdiv(programs, self.blocks))
        run_tiles = triton.cdiv(self.tiles, runs)
        runs = triton.cdiv(self.tiles, run_tiles)
        programs = min(programs, self.blocks * runs)
        keys = self.query.new_empty((self.rows, runs * k), dtype=torch.int64)
        slots = self.query.new_empty((programs * self.config.rows, _SLOTS), dtype=torch.int64)
        _select[(programs,)](
            *self.inputs, keys, slots, self.rows, self.columns, run_tiles, runs, k, *self.strides,
            K=K, SLOTS=_SLOTS, CHUNK=_CHUNK, **self.constants,
        )  # fmt: skip
        if runs == 1:
            return keys
        best = self.query.new_empty((self.rows, k), dtype=torch.int64)
        _merge_runs[(triton.cdiv(self.rows, 8),)](keys, best, self.rows, runs * k, k, K=K, ROWS=8, WIDTH=_SLOTS)
        return best

    def _sorted_keys(self, k: int) -> Tensor:
        best = self.query.new_empty((self.rows, k), dtype=torch.int64)
        chunk = max(1, _ALL_KEYS // self.columns // self.config.rows) * self.config.rows
        keys = self.query.new_empty((min(chunk, self.rows), self.columns), dtype=torch.int64)
        for first in range(0, self.rows, chunk):
            count = min(chunk, self.rows - first)
            grid = (triton.cdiv(count, self.config.rows) * self.tiles,)
            _all_keys[grid](*self.inputs, keys, first, self.rows, self.columns, *self.strides, **self.constants)
            best[first : first + count] = keys[:count].topk(k, dim=1).values
        return best

    def softmax_parts(self, inverse: float) -> Tensor:
        """[rows, segments, 2]: largest score and sum of exponentials."""
        segments = triton.cdiv(self.columns, _SEGMENT)
        parts = self.query.new_empty((self.rows, segments, 2), dtype=torch.float32)
        _softmax_parts[(self.blocks * segments,)](
            *self.inputs, parts, self.rows, self.columns, segments, inverse, *self.strides,
            SEGMENT=_SEGMENT, **self.constants,
        )  # fmt: skip
        return parts
