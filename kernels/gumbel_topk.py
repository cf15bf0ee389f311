"""Top-k memory read with Gumbel noise (memad_fast/ops/gumbel_topk.py has the contract).

score_ij = query_i · memory_j + g(seed, i, j),   the k largest of a row choose the memory rows of its read

            64 columns        A program owns 64 rows and walks over the tiles of its run of columns:
          ┌───────────┐
  64 rows │ q·m, word │ ──►    product and random words of the tile, in registers
          └───────────┘        ──► which scores may reach the row's k-th best, by their words alone: no logarithm
    slots of a row             ──► those are appended to the row's slots, raw
  ┌──────┬────────────┐        ──► no room for another tile: the raw ones get their noise, and the k best stay
  │ best │ raw ...    │
  └──────┴────────────┘        Runs of columns (few rows) are merged afterwards; ``_read`` gathers what was chosen.

No [N, M] matrix exists: slots are 64 KiB a program, two programs a multiprocessor. Above 64 slots all keys of some
rows are stored (64 MiB) and sorted. "softmax" makes its sums over all columns in a second pass (``_softmax_parts``).

Work per score at D = 64: 64 multiply-adds, 8.5 instructions for its random word, 5 to test it, 10 to append it; the
logarithms come to about 300 of the 4,096 scores of a row. README_gumbel_topk.md counts.
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

# Keys that a row holds in _select: its k best and those that await their noise. A tile may add 64, so k ≤ 64; with more
# slots they are sorted less often, but with more in each: 128 cost least at k = 8.
_SLOTS = 128
_SELECTED = 64
# Columns of one part of a softmax sum: for every batch the same, as the order of sums follows from it.
_SEGMENT = 512
# Blocks of _select that a multiprocessor is given.
_BLOCKS = 2
# Most keys that _all_keys leaves at once: 64 MiB.
_ALL_KEYS = 1 << 23


@triton.jit
def key_of(scores, columns):
    """int64 keys whose order is that of (score, lower column): the order-preserving bits of the score, then −column."""
    bits = (scores + 0.0).to(tl.int32, bitcast=True)  # + 0: both zeros are one score
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - columns).to(tl.int64)


@triton.jit
def score_of(keys):
    """The float32 scores of keys."""
    ordered = (keys >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def column_of(keys):
    """The int32 columns of keys."""
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
    for start in range(0, D, DEPTH):
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
def _take_best(keys, to, k, kept):
    """Write the k largest of each row of ``keys`` [ROWS, any] to ``to`` [ROWS], in descending order."""
    for slot in range(0, k):
        best = tl.max(keys, axis=1)
        tl.store(to + slot, best, mask=kept)
        keys = tl.where(keys == best[:, None], _NONE, keys)


@triton.jit
def _keep_best(slots, seed, first_row, k, ROWS: tl.constexpr, SLOTS: tl.constexpr, PART: tl.constexpr):
    """Gives the new keys of each row their noise and leaves its k best, in order, in its first slots."""
    tl.debug_barrier()  # the slots were written by other threads of this program
    slot = tl.arange(0, SLOTS)[None, :]
    for start in range(0, ROWS, PART):
        to = slots + (start + tl.arange(0, PART)) * SLOTS
        keys = tl.load(to[:, None] + slot)
        if seed is not None:
            columns = column_of(keys)
            noise = philox.gumbel(philox.column_words(seed, first_row + start, columns, PART))
            keys = tl.where((slot < k) | (keys == _NONE), keys, key_of(score_of(keys) + noise, columns))
        tl.debug_barrier()
        tl.store(to[:, None] + slot, tl.full([PART, SLOTS], _NONE, tl.int64), mask=slot >= k)
        _take_best(keys, to, k, PART > 0)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["rows", "columns", "run_tiles", "runs", "k"])
def _select(
    query, memory, penalties, seed_at, keys, slots, rows, columns, run_tiles, runs, k,
    query_row, query_column, memory_row, memory_column,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SLOTS: tl.constexpr,
    PART: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    r = tl.arange(0, ROWS)
    slots += tl.program_id(0) * ROWS * SLOTS
    row_slots = slots + r * SLOTS
    seed = None if seed_at is None else tl.load(seed_at)
    tiles = tl.cdiv(columns, COLUMNS)
    for task in range(tl.program_id(0), tl.cdiv(rows, ROWS) * runs, tl.num_programs(0)):
        run = task % runs
        first_row = (task // runs).to(tl.int64) * ROWS
        row = first_row + r
        tl.store(row_slots[:, None] + tl.arange(0, SLOTS)[None, :], tl.full([ROWS, SLOTS], _NONE, tl.int64))
        tl.debug_barrier()
        limit = tl.full([ROWS], float("-inf"), tl.float32)
        count = tl.zeros([ROWS], tl.int32) + k
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
            to = row_slots[:, None] + (count[:, None] + ahead - 1)
            tl.store(to, key_of(scores, column[None, :]), mask=chosen)
            count += tl.sum(chosen.to(tl.int32), axis=1)
            if (tl.max(count) > SLOTS - COLUMNS) | (tile == last):
                _keep_best(slots, seed, first_row, k, ROWS, SLOTS, PART)
                kth = tl.load(row_slots + k - 1)
                limit = score_of(kth)
                if seed is not None:
                    limit = philox.floor(limit)
                limit = tl.where(kth == _NONE, float("-inf"), limit)
                count = tl.zeros([ROWS], tl.int32) + k
        for slot in range(0, k):
            best = tl.load(row_slots + slot)
            tl.store(keys + (row * runs + run) * k + slot, best, mask=row < rows)
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
    seed = None if seed_at is None else tl.load(seed_at)
    scores = tile_scores(
        query, memory, penalties, seed, first_row + block_row.to(tl.int64), first_column, rows, columns,
        query_row, query_column, memory_row, memory_column, D, ROWS, COLUMNS, DEPTH,
    )  # fmt: skip
    r, column = block_row + tl.arange(0, ROWS), philox.tile_columns(first_column, COLUMNS)
    found = tl.where(scores > float("-inf"), key_of(scores, column[None, :]), _NONE)
    at = keys + r.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(at, found, mask=(first_row + r < rows)[:, None] & (column < columns)[None, :])


@triton.jit(do_not_specialize=["rows", "offered", "k"])
def _merge_runs(offered_keys, keys, rows, offered, k, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """The k best of the ``offered`` keys of each row."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    kept = row < rows
    slot = tl.arange(0, WIDTH)[None, :]
    for start in range(0, offered, WIDTH - k):
        at = start - k + slot
        best = tl.load(keys + row[:, None] * k + slot, mask=kept[:, None] & (slot < k) & (start > 0), other=_NONE)
        more = kept[:, None] & (slot >= k) & (at < offered)
        more = tl.load(offered_keys + row[:, None] * offered + at, mask=more, other=_NONE)
        tl.debug_barrier()
        _take_best(tl.maximum(best, more), keys + row * k, k, kept)
        tl.debug_barrier()


@triton.jit(do_not_specialize=["rows", "columns", "segments"])
def _softmax_parts(
    query, memory, penalties, seed_at, parts, rows, columns, segments, inverse,
    query_row, query_column, memory_row, memory_column,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """Of each row and segment of columns: the largest score and the sum of exp((score − largest) / T)."""
    segment = tl.program_id(0) % segments
    first_row = (tl.program_id(0) // segments).to(tl.int64) * ROWS
    seed = None if seed_at is None else tl.load(seed_at)
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
class Config:
    """The tiles of query · memory, and how many of a row block's lists are sorted at once."""

    rows: int
    columns: int
    depth: int
    part: int
    warps: int


# 64 × 64 scores are 32 a thread of 4 warps, 8 × 4 of them neighbours: 3 vector loads from shared memory serve 32
# multiply-adds. What a thread keeps beside them fills its registers on sm_90 and sm_100; elsewhere it takes 8 warps not
# to spill. 16 steps of D at a time and 8 rows of lists need the fewest of them. (The interpreter's time goes by calls.)
CONFIGS = {
    "sm_90": (Config(64, 64, 16, 8, 4),),
    "sm_100": (Config(64, 64, 16, 8, 4),),
    "any": (Config(64, 64, 16, 8, 8),),
    "interpreter": (Config(16, 64, 64, 16, 1),),
}


def shared_bytes(config: Config) -> int:
    """Of a block of _select: the pointers of one tile's stores, on their way to other threads."""
    return config.rows * config.columns * 8


def gumbel_topk(
    query: Tensor, memory: Tensor, k: int, temperature: float, seed: Tensor | None, combine: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The op on a GPU: (read, indices, scores)."""
    rows, width = query.shape
    columns = memory.shape[0]
    read = torch.empty_like(query, memory_format=torch.contiguous_format)
    indices = query.new_empty((rows, k), dtype=torch.int64)
    scores = query.new_empty((rows, k), dtype=torch.float32)
    if rows == 0:
        return read, indices, scores
    on = architecture.architecture(query)
    config = architecture.fitting(CONFIGS, on, shared_bytes)
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
    """[rows] float32: 0 for each row that is finite, −inf for the others."""
    result = matrix.new_empty(matrix.shape[0], dtype=torch.float32)
    grid = (triton.cdiv(matrix.shape[0], 32),)
    _penalties[grid](matrix, result, matrix.shape[0], *matrix.stride(), D=matrix.shape[1], ROWS=32, DEPTH=64)
    return result


class _Product:
    """query · memory + noise, and what is made of it tile by tile."""

    def __init__(self, query: Tensor, memory: Tensor, memory_penalties: Tensor, seed: Tensor | None, config: Config):
        self.rows, width = query.shape
        self.columns = memory.shape[0]
        self.query, self.config = query, config
        self.inputs = (query, memory, memory_penalties, seed)
        self.strides = (*query.stride(), *memory.stride())
        self.blocks = triton.cdiv(self.rows, config.rows)
        self.tiles = triton.cdiv(self.columns, config.columns)
        self.constants = {
            "D": width, "ROWS": config.rows, "COLUMNS": config.columns, "DEPTH": config.depth,
            "num_warps": config.warps, "num_stages": 1, "enable_fp_fusion": False,
        }  # fmt: skip

    def best_keys(self, k: int, programs: int) -> Tensor:
        """The keys of the k best of each row, best first."""
        if k > _SELECTED:
            return self._sorted_keys(k)
        runs = min(self.tiles, triton.cdiv(programs, self.blocks))
        run_tiles = triton.cdiv(self.tiles, runs)
        runs = triton.cdiv(self.tiles, run_tiles)
        programs = min(programs, self.blocks * runs)
        keys = self.query.new_empty((self.rows, runs * k), dtype=torch.int64)
        slots = self.query.new_empty((programs * self.config.rows, _SLOTS), dtype=torch.int64)
        _select[(programs,)](
            *self.inputs, keys, slots, self.rows, self.columns, run_tiles, runs, k, *self.strides,
            SLOTS=_SLOTS, PART=self.config.part, **self.constants,
        )  # fmt: skip
        if runs == 1:
            return keys
        best = self.query.new_empty((self.rows, k), dtype=torch.int64)
        _merge_runs[(triton.cdiv(self.rows, 4),)](keys, best, self.rows, runs * k, k, ROWS=4, WIDTH=512)
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
