"""Thresholded attention over partitioned memory banks in Triton: the read (PMB, eq. 2-5; MemAE's read too), statistics.

    x_j = similarity(q, m_j) / temperature    p = softmax(x)    w = shrink(p)    read = sum_j w_j m_j, per partition

A program has a block of query rows of one partition; all its weights stay in registers:

    Q [rows, D] --(a slice of D at a time)--> x [rows, M] --softmax, threshold--> w --(a slice of D)--> read
                    ^ bank, slices of columns                                 ^ bank, slices of columns

M is cut into pieces of 64 items and a last one of 16, 32 or 64: 150 are worked on as 160, 200 as 208, not as 256. Banks
of more items than a program has registers for are walked over: once for the softmax, once more for each slice of the
read.

Products. Every factor is a sum of bfloat16 parts, exactly: three for float32 and for the weights, two for float16, one
for bfloat16. The tensor cores multiply parts (exactly) and add in float32. Of nine products of parts of two float32
factors the six largest are taken: what is left out is at most 2^-25 of |a b|, below the rounding of a float32 product.
Each slice is summed by itself from the smallest products up and then added, rounded to nearest, to the sum of the
slices before it: tensor cores cut off what they add, and so do it in short sums alone.

Counted, for N query rows of all partitions: 4 N M D operations (in bfloat16 6 times that, for float32); 8 N D bytes.
H200, level 1 of PMB at batch 20 (N = 40,960, M = 150, D = 512): 12.6 GFLOP = 188 us at float32's 67 TFLOP/s, 96 us as
75 TFLOP of bfloat16 at 790; 168 MB = 39 us at 4.3 TB/s.
"""

# Triton compiles flags by if and else.
# ruff: noqa: SIM108

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from memad_fast.kernels import architecture, interpreted
from memad_fast.ops.bank_attention import NORM_FLOOR as _NORM_FLOOR
from memad_fast.ops.bank_attention import SUM_FLOOR as _SUM_FLOOR
from memad_fast.ops.bank_attention import TIE_BAND, _empty_rows_like

NORM_FLOOR = tl.constexpr(_NORM_FLOOR)
SUM_FLOOR = tl.constexpr(_SUM_FLOOR)
# Below every float32, and finite: -inf - -inf would be NaN.
LOWEST = tl.constexpr(-3.4028234663852886e38)

PIECE = 64  # items that are multiplied at once: the narrowest product that keeps Hopper's tensor cores busy
READ_COLUMNS = 128  # of D, in one slice of a read that walks over its bank: each slice computes the weights again


@dataclass(frozen=True)
class Config:
    """How the rows are cut."""

    rows: int
    columns: int
    """Of D, in one slice of either product."""
    warps: int
    stages: int
    items: int
    """Of a program that prepares the bank, or adds up its gradient."""
    resident: int
    """Banks of up to so many items are worked on at once, all weights of a row in registers."""
    descriptors: bool
    """Slices of the bank are fetched by the copy engine (TMA): its addresses cost no registers."""


# "any" last: what serves a processor that nobody has looked at. sm_100 takes rows too few for its fifth-generation
# instructions on purpose: Triton gives each of the many products tensor memory of its own, more than there is.
CONFIGS = {
    "interpreter": [Config(64, 64, 1, 1, 1024, 256, False)],
    "sm_90": [Config(128, 32, 8, 3, 8, 256, True), Config(128, 32, 8, 2, 8, 256, True)],
    "gfx90a": [Config(64, 32, 4, 1, 8, 256, False)],
    "gfx942": [Config(64, 32, 4, 1, 8, 256, False)],
    "any": [Config(32, 32, 4, 2, 8, 256, False), Config(32, 32, 4, 1, 8, 256, False)],
}

# Parts of a factor of each type.
PARTS = {torch.float32: 3, torch.float16: 2, torch.bfloat16: 1}
SOFT, HARD, NONE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
SHRINK = {"soft": SOFT, "hard": HARD, "none": NONE}


# --- products of parts ----------------------------------------------------------------------------------------------


@triton.jit
def zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A block of zeros; its sizes may come from a tuple."""
    return tl.zeros([ROWS, COLUMNS], tl.float32)


@triton.jit
def split(x, PARTS: tl.constexpr, PART: tl.constexpr):
    """float32 ``x`` as a sum of PARTS bfloat16 values (exactly, for three), the largest first."""
    parts = ()
    for _ in tl.static_range(PARTS):
        part = x.to(tl.bfloat16)
        x -= part.to(tl.float32)
        parts = parts + (part.to(PART),)
    return parts


@triton.jit
def product(left, right):
    """left . right of split factors, without the products of parts below 2^-25; the smallest are added first."""
    total = zeros(left[0].shape[0], right[0].shape[1])
    for order in tl.static_range(2, -1, -1):
        for i in tl.static_range(len(left)):
            if order >= i and order - i < len(right):
                total = tl.dot(left[i], right[order - i], total, input_precision="ieee")
    return total


@triton.jit
def transposed(parts):
    """Every part transposed."""
    turned = ()
    for i in tl.static_range(len(parts)):
        turned = turned + (tl.trans(parts[i]),)
    return turned


@triton.jit
def load_items(
    bank, first, column, part_items, ITEMS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
    PARTS: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """The parts of [ITEMS, COLUMNS] of the prepared bank, from item ``first`` and ``column`` on."""
    parts = ()
    for i in tl.static_range(PARTS):
        if DESCRIPTORS:
            part = bank.load([(first + i * part_items).to(tl.int32), column])
        else:
            start = bank + ((first + i * part_items) * WIDTH + column)
            part = tl.load(start + (tl.arange(0, ITEMS)[:, None] * WIDTH + tl.arange(0, COLUMNS)))
        parts = parts + (part,)
    return parts


# --- rows of the query ----------------------------------------------------------------------------------------------


@triton.jit
def row_offsets(
    start, first, inner, rows_inner, stride_outer, stride_inner, stride_row, ROWS: tl.constexpr, VECTOR: tl.constexpr
):
    """Where ROWS rows of the partition at ``start`` lie: [outer, inner, C], each with a stride of its own.

    Indices that count from the first row stay below the sizes, in 32 bits. VECTOR divides start and strides: that
    many values may be read at once.
    """
    row = (first % rows_inner).to(tl.int32) + tl.arange(0, ROWS)
    block = (first // rows_inner % inner).to(tl.int32) + row // rows_inner
    outer = first // rows_inner // inner + block // inner
    offsets = start + outer * stride_outer + (block % inner).to(tl.int64) * stride_inner
    return tl.multiple_of(offsets + (row % rows_inner).to(tl.int64) * stride_row, VECTOR)


@triton.jit
def load_rows(rows, row_mask, column, D: tl.constexpr, COLUMNS: tl.constexpr):
    """[rows, COLUMNS] from ``column`` on, in float32."""
    columns = column + tl.arange(0, COLUMNS)
    return tl.load(rows[:, None] + columns, mask=row_mask[:, None] & (columns < D), other=0.0).to(tl.float32)


@triton.jit
def norms(rows, row_mask, D: tl.constexpr, COLUMNS: tl.constexpr):
    """In float64: no square overflows, none that matters underflows, and the order of the sum does not show."""
    squares = tl.zeros([rows.shape[0], COLUMNS], tl.float64)
    for column in tl.range(0, D, COLUMNS):
        x = load_rows(rows, row_mask, column, D, COLUMNS).to(tl.float64)
        squares += x * x
    return tl.sqrt(tl.sum(squares, axis=1))


@triton.jit
def row_scales(rows, row_mask, D: tl.constexpr, COLUMNS: tl.constexpr, COSINE: tl.constexpr):
    """(before, after, direction): q * before is exact and at most 2 long, that times after is q / max(norm, floor).

    direction is 1 / norm, or 0 at the floor, where no gradient passes; all are 1 for the dot product.
    """
    before = tl.full(rows.shape, 1.0, tl.float32)
    after = before
    direction = before
    if COSINE:
        plain = norms(rows, row_mask, D, COLUMNS)
        norm = tl.maximum(plain, NORM_FLOOR, propagate_nan=tl.PropagateNan.ALL)
        direction = tl.where(plain <= NORM_FLOOR, 0.0, 1.0 / norm).to(tl.float32)
        power = (norm.to(tl.int64, bitcast=True) & 0x7FF0000000000000).to(tl.float64, bitcast=True)
        before = (1.0 / power).to(tl.float32)
        after = (power / norm).to(tl.float32)
    return before, after, direction


@triton.jit
def against_items(
    rows, row_mask, before, bank, last, first, part_items,
    D: tl.constexpr, WIDTH: tl.constexpr, PIECES: tl.constexpr, COLUMNS: tl.constexpr, ROW_PARTS: tl.constexpr,
    PARTS: tl.constexpr, PART: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """(rows * before) . items^T for the items from ``first`` on, a block for each piece."""
    sums = ()
    for i in tl.static_range(len(PIECES)):
        sums = sums + (zeros(rows.shape[0], PIECES[i]),)
    for column in tl.range(0, D, COLUMNS):
        left = split(load_rows(rows, row_mask, column, D, COLUMNS) * before[:, None], ROW_PARTS, PART)
        added = ()
        item = first
        for i in tl.static_range(len(PIECES)):
            items = load_items(
                last if i == len(PIECES) - 1 else bank, item, column, part_items, PIECES[i], COLUMNS, WIDTH, PARTS,
                DESCRIPTORS,
            )  # fmt: skip
            added = added + (sums[i] + product(left, transposed(items)),)
            item += PIECES[i]
        sums = added
    return sums


# --- the softmax ----------------------------------------------------------------------------------------------------


@triton.jit
def logits(products, after, scales, first, M):
    """x_j of the items from ``first`` on, -inf past the last; NaN for an item that is not finite."""
    x = ()
    item = first
    for i in tl.static_range(len(products)):
        j = item + tl.arange(0, products[i].shape[1])
        scale = tl.load(scales + j)
        x = x + (tl.where(j < M, products[i] * after[:, None] * scale, float("-inf")),)
        item += products[i].shape[1]
    return x


@triton.jit
def largest(x, top):
    """The largest of each row and ``top``."""
    for i in tl.static_range(len(x)):
        top = tl.maximum(top, tl.max(x[i], axis=1))
    return top


@triton.jit
def exponentials(x, top):
    """e_j = exp(x_j - top): exactly 1 for the largest."""
    e = ()
    for i in tl.static_range(len(x)):
        e = e + (tl.exp(x[i] - top[:, None]),)
    return e


@triton.jit
def row_sum(blocks):
    """The sum of each row over all pieces."""
    total = tl.sum(blocks[0], axis=1)
    for i in tl.static_range(1, len(blocks)):
        total += tl.sum(blocks[i], axis=1)
    return total


@triton.jit
def with_tile(top, total, x):
    """The largest logit and the sum of exponentials of what was seen before and ``x``."""
    new_top = largest(x, top)
    return new_top, total * tl.exp(top - new_top) + row_sum(exponentials(x, new_top))


@triton.jit
def shrunk(e, total, threshold, cut, SHRINK: tl.constexpr):
    """Kept weights in units of 1 / total: e - t total (soft) or e (hard) where e is above the cut."""
    kept = ()
    for i in tl.static_range(len(e)):
        if SHRINK == NONE:
            kept = kept + (e[i],)
        else:
            above = e[i] > (cut * total)[:, None]
            kept = kept + (tl.where(above, e[i] - (threshold * total)[:, None] if SHRINK == SOFT else e[i], 0.0),)
    return kept


@triton.jit
def weight_factor(total, kept_sum, RENORMALIZE: tl.constexpr):
    """What makes kept weights w; NaN for a row that has a NaN."""
    if RENORMALIZE:
        factor = 1.0 / tl.maximum(kept_sum, SUM_FLOOR * total)
    else:
        factor = 1.0 / total
    return tl.where(total == total, factor, total)


@triton.jit
def store_rows(out, row_mask, column, values, D: tl.constexpr):
    """``values`` to the rows at ``out``, from ``column`` on, in their type."""
    columns = column + tl.arange(0, values.shape[1])
    mask = row_mask[:, None] & (columns < D)
    tl.store(out[:, None] + columns, values.to(out.dtype.element_ty), mask=mask)


# --- kernels --------------------------------------------------------------------------------------------------------


# Sizes and strides compile nothing; how rows are aligned is told by VECTOR.
NOT_SPECIALIZED = [
    *("count", "inner", "rows_inner", "partitions", "M", "padded", "part_items"),
    *("query_outer", "query_inner", "query_partition", "query_row"),
    *("read_outer", "read_inner", "read_partition", "read_row"),
]


@triton.jit(do_not_specialize=["M", "padded", "part_items", "stride_partition", "stride_item"])
def prepare_kernel(
    bank, parts, scales, inverse_temperature, M, padded, part_items, stride_partition, stride_item,
    D: tl.constexpr, WIDTH: tl.constexpr, ITEMS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
    COSINE: tl.constexpr,
):  # fmt: skip
    """Parts, scales and directions of ITEMS items of the banks, each padded with zeros."""
    item = tl.program_id(0).to(tl.int64) * ITEMS + tl.arange(0, ITEMS)
    j = item % padded
    rows = bank + (item // padded) * stride_partition + j * stride_item
    row_mask = (item < part_items) & (j < M)
    for column in tl.range(0, WIDTH, COLUMNS):
        split_items = split(load_rows(rows, row_mask, column, D, COLUMNS), PARTS, parts.dtype.element_ty)
        for i in tl.static_range(PARTS):
            to = parts + (item[:, None] + i * part_items) * WIDTH + (column + tl.arange(0, COLUMNS))
            tl.store(to, split_items[i], mask=(item < part_items)[:, None])
    norm = norms(rows, row_mask, D, COLUMNS)
    direction = tl.full([ITEMS], 1.0, tl.float64)
    inverse = direction
    if COSINE:
        inverse = 1.0 / tl.maximum(norm, NORM_FLOOR)
        direction = tl.where(norm > NORM_FLOOR, inverse, 0.0)
    scale = tl.where(norm < float("inf"), inverse * inverse_temperature, float("nan"))
    tl.store(scales + item, scale.to(tl.float32), mask=item < part_items)
    tl.store(scales + part_items + item, direction.to(tl.float32), mask=item < part_items)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def read_kernel(
    query, read, bank, last, scales, threshold, cut,
    count, inner, rows_inner, partitions, M, padded, part_items,
    query_outer, query_inner, query_partition, query_row, read_outer, read_inner, read_partition, read_row,
    D: tl.constexpr, WIDTH: tl.constexpr, PIECES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ROW_PARTS: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, VECTOR: tl.constexpr, SHRINK: tl.constexpr,
    RENORMALIZE: tl.constexpr, COSINE: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """The reads of ROWS rows of a partition whose items are all in PIECES."""
    partition = (tl.program_id(0) % partitions).to(tl.int64)
    first_row = (tl.program_id(0) // partitions).to(tl.int64) * ROWS
    row_mask = tl.arange(0, ROWS) < count - first_row
    rows = query + row_offsets(
        partition * query_partition, first_row, inner, rows_inner, query_outer, query_inner, query_row, ROWS, VECTOR
    )
    start = partition * padded
    before, after, _ = row_scales(rows, row_mask, D, COLUMNS, COSINE)
    products = against_items(
        rows, row_mask, before, bank, last, start, part_items, D, WIDTH, PIECES, COLUMNS, ROW_PARTS, PARTS, PART,
        DESCRIPTORS,
    )  # fmt: skip
    x = logits(products, after, scales + start, 0, M)
    e = exponentials(x, largest(x, tl.full([ROWS], LOWEST, tl.float32)))
    total = row_sum(e)
    kept = shrunk(e, total, threshold, cut, SHRINK)
    factor = weight_factor(total, row_sum(kept), RENORMALIZE)
    out = read + row_offsets(
        partition * read_partition, first_row, inner, rows_inner, read_outer, read_inner, read_row, ROWS, VECTOR
    )
    # The parts of all weights are more than the registers hold, so each slice splits them anew.
    for column in tl.range(0, D, COLUMNS, disable_licm=True):
        sums = zeros(ROWS, COLUMNS)
        item = start
        for i in tl.static_range(len(PIECES)):
            items = load_items(
                last if i == len(PIECES) - 1 else bank, item, column, part_items, PIECES[i], COLUMNS, WIDTH, PARTS,
                DESCRIPTORS,
            )  # fmt: skip
            sums += product(split(kept[i], 3, PART), items)
            item += PIECES[i]
        store_rows(out, row_mask, column, sums * factor[:, None], D)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def read_tiles_kernel(
    query, read, bank, wide, scales, threshold, cut,
    count, inner, rows_inner, partitions, M, padded, part_items,
    query_outer, query_inner, query_partition, query_row, read_outer, read_inner, read_partition, read_row,
    D: tl.constexpr, WIDTH: tl.constexpr, ITEMS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    READ_COLUMNS: tl.constexpr, ROW_PARTS: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr,
    VECTOR: tl.constexpr, SHRINK: tl.constexpr, RENORMALIZE: tl.constexpr, COSINE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """The same for any number of items, ITEMS at a time."""
    partition = (tl.program_id(0) % partitions).to(tl.int64)
    first_row = (tl.program_id(0) // partitions).to(tl.int64) * ROWS
    row_mask = tl.arange(0, ROWS) < count - first_row
    rows = query + row_offsets(
        partition * query_partition, first_row, inner, rows_inner, query_outer, query_inner, query_row, ROWS, VECTOR
    )
    start = partition * padded
    before, after, _ = row_scales(rows, row_mask, D, COLUMNS, COSINE)
    top = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for first in tl.range(0, padded, ITEMS):
        products = against_items(
            rows, row_mask, before, bank, bank, start + first, part_items, D, WIDTH, (ITEMS,), COLUMNS, ROW_PARTS,
            PARTS, PART, DESCRIPTORS,
        )  # fmt: skip
        x = logits(products, after, scales + start, first, M)
        top, total = with_tile(top, total, x)
    out = read + row_offsets(
        partition * read_partition, first_row, inner, rows_inner, read_outer, read_inner, read_row, ROWS, VECTOR
    )
    for column in tl.range(0, D, READ_COLUMNS):
        sums = zeros(ROWS, READ_COLUMNS)
        kept_sum = tl.zeros([ROWS], tl.float32)
        for first in tl.range(0, padded, ITEMS):
            products = against_items(
                rows, row_mask, before, bank, bank, start + first, part_items, D, WIDTH, (ITEMS,), COLUMNS, ROW_PARTS,
                PARTS, PART, DESCRIPTORS,
            )  # fmt: skip
            e = exponentials(logits(products, after, scales + start, first, M), top)
            kept = shrunk(e, total, threshold, cut, SHRINK)
            kept_sum += row_sum(kept)
            items = load_items(wide, start + first, column, part_items, ITEMS, READ_COLUMNS, WIDTH, PARTS, DESCRIPTORS)
            sums += product(split(kept[0], 3, PART), items)
        factor = weight_factor(total, kept_sum, RENORMALIZE)
        store_rows(out, row_mask, column, sums * factor[:, None], D)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def stats_kernel(
    query, entropies, dead, bank, scales, cut, count, inner, rows_inner, partitions, M, padded, part_items,
    query_outer, query_inner, query_partition, query_row,
    D: tl.constexpr, WIDTH: tl.constexpr, ITEMS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ROW_PARTS: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, VECTOR: tl.constexpr, COSINE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """The sum of the entropies of ROWS rows, and how many of them are dead; ITEMS items at a time."""
    partition = (tl.program_id(0) % partitions).to(tl.int64)
    first_row = (tl.program_id(0) // partitions).to(tl.int64) * ROWS
    row_mask = tl.arange(0, ROWS) < count - first_row
    rows = query + row_offsets(
        partition * query_partition, first_row, inner, rows_inner, query_outer, query_inner, query_row, ROWS, VECTOR
    )
    start = partition * padded
    before, after, _ = row_scales(rows, row_mask, D, COLUMNS, COSINE)
    top = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    spread = total  # sum of e (x - top)
    for first in tl.range(0, padded, ITEMS, num_stages=1):
        products = against_items(
            rows, row_mask, before, bank, bank, start + first, part_items, D, WIDTH, (ITEMS,), COLUMNS, ROW_PARTS,
            PARTS, PART, DESCRIPTORS,
        )  # fmt: skip
        x = logits(products, after, scales + start, first, M)
        new_top = largest(x, top)
        e = exponentials(x, new_top)
        moved = tl.where(total > 0.0, tl.exp(top - new_top) * (spread + (top - new_top) * total), 0.0)
        spread = moved + tl.sum(tl.where(e[0] > 0.0, e[0] * (x[0] - new_top[:, None]), 0.0), axis=1)
        top, total = with_tile(top, total, x)
    wide = total.to(tl.float64)
    entropy = tl.log(wide) - spread.to(tl.float64) / wide
    # The largest weight is 1 in units of 1 / total.
    is_dead = (total == total) & (cut * total >= 1.0)
    tl.store(entropies + tl.program_id(0), tl.sum(tl.where(row_mask, entropy, 0.0), axis=0))
    tl.store(dead + tl.program_id(0), tl.sum((row_mask & is_dead).to(tl.int32), axis=0))


# --- launchers ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """The query rows of every partition of a [..., P, C, D] tensor, as [outer, inner, P, C, D] with any strides."""

    tensor: Tensor

    @staticmethod
    def of(tensor: Tensor) -> Rows:
        """In place if the last dimension is contiguous and all but two leading dimensions merge; else of a copy."""
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            tensor = tensor.contiguous()
        while tensor.dim() > 5:
            tensor = tensor.flatten(0, 1)
        return Rows(tensor[(None,) * (5 - tensor.dim())])

    @property
    def count(self) -> int:
        """Of one partition."""
        outer, inner, _, rows, _ = self.tensor.shape
        return outer * inner * rows

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Rows of a partition, inner, C, P."""
        _, inner, partitions, rows, _ = self.tensor.shape
        return self.count, inner, rows, partitions

    @property
    def strides(self) -> tuple[int, int, int, int]:
        """Of outer, inner, P, C; 0 where there is nothing to step over."""
        shape, strides = self.tensor.shape, self.tensor.stride()
        outer, inner, partition, row = (strides[i] if shape[i] > 1 else 0 for i in range(4))
        return outer, inner, partition, row

    def copy_to(self, tensor: Tensor) -> None:
        """Where these are the rows of a copy of ``tensor``: copy what was written to them back."""
        if self.tensor.data_ptr() != tensor.data_ptr():
            tensor.copy_(self.tensor.reshape(tensor.shape))


def vector(*rows: Rows) -> int:
    """How many values, up to 16 bytes, may be read or written at once from the start of every row."""
    return math.gcd(16 // rows[0].tensor.element_size(), *(stride for one in rows for stride in one.strides))


@dataclass(frozen=True)
class Bank:
    """A bank as the kernels read it."""

    parts: Tensor
    """[parts, P, padded items, WIDTH]: bfloat16 values whose sum over the parts is the item."""
    scales: Tensor
    """[2, P, padded items]: x_j = scale_j (q . m_j), NaN for an item that is not finite; 1 / norm_j, 0 at the floor."""
    items: int

    def block(self, items: int, columns: int, descriptors: bool) -> Tensor | TensorDescriptor:
        """What a kernel loads [items, columns] from."""
        flat = self.parts.view(-1, self.parts.shape[-1])
        return TensorDescriptor.from_tensor(flat, [items, columns]) if descriptors else flat

    @property
    def sizes(self) -> tuple[int, int, int]:
        """M, the padded M, and the items of one part."""
        _, partitions, padded, _ = self.parts.shape
        return self.items, padded, partitions * padded


def pieces_of(items: int) -> tuple[int, ...]:
    """``items`` as full pieces and a last one of 16, 32 or 64."""
    full = (items - 1) // PIECE
    return (PIECE,) * full + (max(16, triton.next_power_of_2(items - full * PIECE)),)


def padded_to_pieces(items: int) -> int:
    """``items`` as full pieces alone, for kernels that walk over them."""
    return triton.cdiv(items, PIECE) * PIECE


def columns_of(width: int, most: int) -> int:
    """Columns of a slice of rows of ``width``: a power of two that a product takes."""
    return max(16, min(most, triton.next_power_of_2(width)))


def part_type() -> torch.dtype:
    """What parts are stored as: Triton's interpreter multiplies no bfloat16, so there they are float32."""
    return torch.float32 if interpreted() else torch.bfloat16


def part() -> tl.dtype:
    """The same for kernels."""
    return tl.float32 if interpreted() else tl.bfloat16


def prepare(bank: Tensor, similarity: str, temperature: float, padded: int, columns: int, config: Config) -> Bank:
    """Split the items and measure their norms, once for all rows; slices of ``columns`` cover the padded rows."""
    if bank.shape[-1] > 1 and bank.stride(-1) != 1:
        bank = bank.contiguous()
    partitions, items, width = bank.shape
    shape = (PARTS[bank.dtype], partitions, padded, max(1, triton.cdiv(width, columns)) * columns)
    parts = torch.empty(shape, dtype=part_type(), device=bank.device)
    scales = torch.empty((2, partitions, padded), dtype=torch.float32, device=bank.device)
    prepared = Bank(parts, scales, items)
    prepare_kernel[(triton.cdiv(partitions * padded, config.items),)](
        bank, parts, scales, 1.0 / temperature, *prepared.sizes, bank.stride(0), bank.stride(1),
        D=width, WIDTH=shape[3], ITEMS=config.items, COLUMNS=min(columns, 64), PARTS=shape[0],
        COSINE=similarity == "cosine", num_warps=1,
    )  # fmt: skip
    return prepared


def items_at_once(items: int, config: Config) -> int:
    """How many items, padded, a program works on at a time."""
    return sum(pieces_of(items)) if items <= config.resident else PIECE


def read_config(query: Tensor, bank: Tensor) -> Config:
    """For this processor and these sizes; the number of rows has no say, so it changes no bit."""
    parts, (_, items, width) = PARTS[bank.dtype], bank.shape

    def shared_bytes(config: Config) -> int:
        columns = columns_of(width, config.columns)
        slices = parts * items_at_once(items, config) * columns * 2 + config.rows * columns * query.element_size()
        return config.stages * slices + config.rows * columns * 4

    return architecture.fitting(CONFIGS, architecture.architecture(query), shared_bytes)


def bank_attention(
    query: Tensor,
    bank: Tensor,
    threshold: float,
    shrink: str,
    renormalize: bool,
    similarity: str,
    temperature: float,
) -> Tensor:
    """See ``memad_fast.bank_attention``."""
    read = _empty_rows_like(query)
    if query.numel() == 0:
        return read
    rows, out = Rows.of(query), Rows.of(read)
    partitions, items, width = bank.shape
    config = read_config(query, bank)
    columns = columns_of(width, config.columns)
    flags = {
        "D": width, "ROWS": config.rows, "COLUMNS": columns, "ROW_PARTS": PARTS[query.dtype],
        "PARTS": PARTS[query.dtype], "PART": part(), "VECTOR": vector(rows, out), "SHRINK": SHRINK[shrink],
        "RENORMALIZE": renormalize, "COSINE": similarity == "cosine", "DESCRIPTORS": config.descriptors,
        "num_warps": config.warps, "num_stages": config.stages,
    }  # fmt: skip
    threshold = min(threshold, 2.0)  # no weight is above 1
    grid = (triton.cdiv(rows.count, config.rows) * partitions,)
    if items <= config.resident:
        pieces = pieces_of(items)
        prepared = prepare(bank, similarity, temperature, sum(pieces), columns, config)
        read_kernel[grid](
            rows.tensor, out.tensor, prepared.block(PIECE, columns, config.descriptors),
            prepared.block(pieces[-1], columns, config.descriptors), prepared.scales,
            threshold, threshold * (1.0 + TIE_BAND), *rows.sizes, *prepared.sizes, *rows.strides, *out.strides,
            WIDTH=prepared.parts.shape[-1], PIECES=pieces, **flags,
        )  # fmt: skip
    else:
        wide = columns_of(width, READ_COLUMNS)
        prepared = prepare(bank, similarity, temperature, padded_to_pieces(items), wide, config)
        read_tiles_kernel[grid](
            rows.tensor, out.tensor, prepared.block(PIECE, columns, config.descriptors),
            prepared.block(PIECE, wide, config.descriptors), prepared.scales,
            threshold, threshold * (1.0 + TIE_BAND), *rows.sizes, *prepared.sizes, *rows.strides, *out.strides,
            WIDTH=prepared.parts.shape[-1], ITEMS=PIECE, READ_COLUMNS=wide, **flags,
        )  # fmt: skip
    out.copy_to(read)
    return read


def bank_attention_stats(
    query: Tensor, bank: Tensor, threshold: float, shrink: str, similarity: str, temperature: float
) -> tuple[Tensor, Tensor]:
    """See ``memad_fast.bank_attention_stats``."""
    rows = Rows.of(query)
    partitions, items, width = bank.shape
    config = read_config(query, bank)
    columns = columns_of(width, config.columns)
    prepared = prepare(bank, similarity, temperature, padded_to_pieces(items), columns, config)
    blocks = triton.cdiv(rows.count, config.rows)
    entropies = torch.empty((blocks, partitions), dtype=torch.float64, device=query.device)
    dead = torch.empty((blocks, partitions), dtype=torch.int32, device=query.device)
    if entropies.numel() > 0:
        cut = 0.0 if shrink == "none" else min(threshold, 2.0) * (1.0 + TIE_BAND)
        stats_kernel[(blocks * partitions,)](
            rows.tensor, entropies, dead, prepared.block(PIECE, columns, config.descriptors), prepared.scales, cut,
            *rows.sizes, *prepared.sizes, *rows.strides,
            D=width, WIDTH=prepared.parts.shape[-1], ITEMS=PIECE, ROWS=config.rows, COLUMNS=columns,
            ROW_PARTS=PARTS[query.dtype], PARTS=PARTS[query.dtype], PART=part(), VECTOR=vector(rows),
            COSINE=similarity == "cosine", DESCRIPTORS=config.descriptors, num_warps=config.warps,
            num_stages=config.stages,
        )  # fmt: skip
    # Means over no rows are NaN.
    return (dead.sum(0).double() / rows.count).float(), (entropies.sum(0) / rows.count).float()
