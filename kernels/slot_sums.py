"""Scatter-add without atomics: for every row of a memory, the sum over the slots that point at it, in their order.

    out[m] = Σ  a_s · own[m] + b_s · other[s // k]      over the slots s with indices[s] = m, ascending, in float64

A slot is one result of a read: slot s = n · k + j is the j-th row that query n found. Where a kernel with atomics would
add in any order, a stable sort of the indices (on the device, nothing waits) lists each row's slots in order:

    indices   2 0 2 -1 0 2          slots, sorted by row     3 | 1 4 | | 0 2 5
                                    start                       1   3 3       6

    row m, first SEGMENT slots  ──────────────────────────────►  + ──► out[m]
    row m, each later SEGMENT   ──►  partial sum, a program each ──┘   (float64, added in order)

So one program walks over at most SEGMENT slots and a row that every query chose is shared by many. Which slots are
added together depends on that row's own list alone; a row of up to SEGMENT slots is the sequential sum of the CPU, bit
for bit.

Bytes: N·k·D of `other` once, M·D of `own` and `out` once, the sort of N·k short integers, partial sums of at most
N·k / SEGMENT rows in float64 (1/64 byte for each element of `other` that is read). The longest chain of dependent
additions is SEGMENT + N·k / SEGMENT: 1,024 for 262,144 queries that all chose one key.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Slots that one program walks over: the square root of the number of queries of a large call (see the head).
_SEGMENT = 512
# Columns of a program: 4 a thread, so that a float32 row is read 16 bytes a thread.
_COLS = 512
_COLS_A_WARP = 128
# Rows that are loaded at once: additions wait for each other, loads must not. ``_add_in_order`` is written for 8.
AHEAD = tl.constexpr(8)


def sum_by_row(kind: str, weights: Tensor, own: Tensor, other: Tensor, k: int, indices: Tensor, out: Tensor) -> None:
    """Write the sums of the head to every row of ``out``.

    Args:
        kind: how a slot's a and b come from ``weights``, see ``weigh``.
        weights: contiguous; one or two numbers a slot.
        own: ``[M, D]``, any strides; not read where ``kind`` has no a.
        other: ``[N, D]``, any strides.
        k: slots of each row of ``other``.
        indices: ``[N, k]`` or ``[N]`` int64; a slot outside [0, M) is in no sum. Less than 2³¹, what torch sorts.
        out: ``[M, D]``, contiguous.
    """
    rows, width = out.shape
    if rows == 0 or width == 0:
        return
    slots, start = _lists(indices, rows)
    cols = min(triton.next_power_of_2(width), _COLS)
    blocks = triton.cdiv(width, cols)
    tails = max(indices.numel() - 1, 0) // _SEGMENT  # no row list has more than so many segments after its first
    tail_end = ((start.diff() - 1).clamp_(min=0) // _SEGMENT).cumsum(0) if tails else start
    partial = out.new_empty(tails, width, dtype=torch.float64)
    shared = (weights, indices.numel(), own, *own.stride(), other, *other.stride(), k, slots, start, tail_end, partial)
    constants = {"KIND": kind, "D": width, "COLS": cols, "SEGMENT": _SEGMENT}
    options = {"num_warps": max(1, cols // _COLS_A_WARP), "enable_fp_fusion": False}
    if tails:
        tail_row = torch.searchsorted(tail_end, torch.arange(tails, device=out.device), right=True)
        _sum_tails[(tails * blocks,)](*shared, tail_row, rows, **constants, **options)
    _sum_rows[(rows * blocks,)](*shared, out, HAS_TAILS=tails > 0, **constants, **options)


def _lists(indices: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The slots in the order of the rows they point at, and where each row's begin and the last one's end: [M + 1]."""
    short = next(kind for kind in (torch.int16, torch.int32, torch.int64) if rows <= torch.iinfo(kind).max)
    pointed = indices.flatten().clamp(-1, rows).to(short)  # the fewer bits, the fewer passes of the radix sort
    ordered, slots = pointed.sort(stable=True)
    return slots, torch.searchsorted(ordered, torch.arange(rows + 1, dtype=short, device=indices.device))


@triton.jit
def weigh(weights, slot, slots, live, KIND: tl.constexpr):
    """What ``terms_of`` needs of the slots' weights, in float64: a (for "l2" it takes -b) and b.

    "l2": weights g, a = 2g, b = -2g. "ip": weights g, a = 0, b = g. "cosine": weights [2, slots], a and b themselves.
    "sum": no weights, a = 0, b = 1.
    """
    if KIND == "sum":
        other = tl.full(slot.shape, 1.0, tl.float64)
        own = other
    elif KIND == "cosine":
        own = tl.load(weights + slot, mask=live, other=0.0)
        other = tl.load(weights + slots + slot, mask=live, other=0.0)
    else:
        grad = tl.load(weights + slot, mask=live, other=0.0).to(tl.float64)
        other = grad if KIND == "ip" else -2.0 * grad
        own = other
    return own, other


@triton.jit
def terms_of(own_weight, own, other_weight, other, KIND: tl.constexpr):
    """a · own + b · other in float64, each operation rounded; shapes broadcast."""
    terms = other_weight * wide(other)
    if KIND == "l2":
        terms = -other_weight * wide(own) + terms
    elif KIND == "cosine":
        terms = own_weight * wide(own) + terms
    return terms


@triton.jit
def wide(values):
    """float16, bfloat16 or float32 to float64."""
    return values.to(tl.float32).to(tl.float64)


@triton.jit
def _sum_slots(
    begin, end, weights, slot_count, own, other, other_row, other_col, k, slots, col,
    KIND: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Σ over slots[begin, end), in order."""
    total = tl.zeros(col.shape, tl.float64)
    own_weight, other_weight, found = _load(
        begin, end, weights, slot_count, other, other_row, other_col, k, slots, col, KIND, D
    )
    for first in range(begin, end, AHEAD):
        # The rows that follow are on their way while these are added. Left to itself, the compiler saves registers by
        # loading row after row, each when it is added.
        own_weight_next, other_weight_next, found_next = _load(
            first + AHEAD, end, weights, slot_count, other, other_row, other_col, k, slots, col, KIND, D
        )
        terms = terms_of(own_weight[None, :], own[:, None], other_weight[None, :], found, KIND)
        total = _add_in_order(total, terms)
        own_weight, other_weight, found = own_weight_next, other_weight_next, found_next
    return total


@triton.jit
def _load(
    first, end, weights, slot_count, other, other_row, other_col, k, slots, col, KIND: tl.constexpr, D: tl.constexpr
):
    """Weights [AHEAD] and rows of ``other`` [cols, AHEAD] of slots[first, first + AHEAD); zeros from ``end`` on."""
    live = first + tl.arange(0, AHEAD) < end
    slot = tl.load(slots + first + tl.arange(0, AHEAD), mask=live, other=0)
    own_weight, other_weight = weigh(weights, slot, slot_count, live, KIND)
    found = tl.load(
        other + (slot // k * other_row)[None, :] + (col.to(tl.int64) * other_col)[:, None],
        mask=live[None, :] & (col < D)[:, None],
        other=0.0,
    )
    return own_weight, other_weight, found


@triton.jit
def _add_in_order(total, terms):
    """``total`` + terms[:, 0] + terms[:, 1] + … + terms[:, AHEAD - 1], one after the other."""
    even, odd = _halves(terms)
    even_even, even_odd = _halves(even)
    odd_even, odd_odd = _halves(odd)
    term0, term4 = tl.split(even_even)
    term2, term6 = tl.split(even_odd)
    term1, term5 = tl.split(odd_even)
    term3, term7 = tl.split(odd_odd)
    return total + term0 + term1 + term2 + term3 + term4 + term5 + term6 + term7


@triton.jit
def _halves(terms):
    """The even and the odd columns: [C, 2n] → [C, n] each."""
    return tl.split(tl.reshape(terms, [terms.shape[0], terms.shape[1] // 2, 2]))


@triton.jit(do_not_specialize=["slot_count", "rows"])
def _sum_tails(
    weights, slot_count, own, own_row, own_col, other, other_row, other_col, k, slots, start, tail_end, partial,
    tail_row, rows,
    KIND: tl.constexpr, D: tl.constexpr, COLS: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    tail, col = _tile(D, COLS)
    row = tl.load(tail_row + tail)
    if row < rows:
        end = tl.load(start + row + 1)
        # Counted from the row's last tail, which holds what the full segments before it leave over.
        behind = tl.load(tail_end + row) - 1 - tail
        first = tl.load(start + row)
        begin = first + ((end - first - 1) // SEGMENT - behind) * SEGMENT
        own_values = tl.load(own + row * own_row + col.to(tl.int64) * own_col, mask=col < D, other=0.0)
        total = _sum_slots(
            begin, tl.minimum(begin + SEGMENT, end), weights, slot_count, own_values, other, other_row, other_col, k,
            slots, col, KIND, D,
        )  # fmt: skip
        tl.store(partial + tail * D + col, total, mask=col < D)


@triton.jit(do_not_specialize=["slot_count"])
def _sum_rows(
    weights, slot_count, own, own_row, own_col, other, other_row, other_col, k, slots, start, tail_end, partial, out,
    HAS_TAILS: tl.constexpr,
    KIND: tl.constexpr, D: tl.constexpr, COLS: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    row, col = _tile(D, COLS)
    begin, end = tl.load(start + row), tl.load(start + row + 1)
    own_values = tl.load(own + row * own_row + col.to(tl.int64) * own_col, mask=col < D, other=0.0)
    total = _sum_slots(
        begin, tl.minimum(begin + SEGMENT, end), weights, slot_count, own_values, other, other_row, other_col, k,
        slots, col, KIND, D,
    )  # fmt: skip
    if HAS_TAILS:
        last = tl.load(tail_end + row)
        tails = tl.maximum(end - begin - 1, 0) // SEGMENT
        for first in range(last - tails, last, AHEAD):
            at = first + tl.arange(0, AHEAD)
            live = (at < last)[None, :] & (col < D)[:, None]
            sums = tl.load(partial + (at * D)[None, :] + col[:, None], mask=live, other=0.0)
            total = _add_in_order(total, sums)
    tl.store(out + row * D + col, total.to(tl.float32).to(out.dtype.element_ty), mask=col < D)


@triton.jit
def _tile(D: tl.constexpr, COLS: tl.constexpr):
    """The row and the columns of this program."""
    program = tl.program_id(0).to(tl.int64)
    blocks: tl.constexpr = (D + COLS - 1) // COLS
    return program // blocks, (program % blocks).to(tl.int32) * COLS + tl.arange(0, COLS)
