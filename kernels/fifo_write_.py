"""Ring write of a FIFO memory (MemSTC-Net, eq. 7): new row i replaces slot (cursor + i) mod M, in place.

    program p:  new rows [first + p · ROWS, first + (p + 1) · ROWS)  →  their slots, keys then values, COLS at a time
    advance:    cursor = (cursor + n) mod M, in a launch of its own: every program must have read the old one

first = max(n − M, 0): of more new rows than slots, the older ones would be overwritten within the call, so only the
newest M are copied and no two programs meet. The cursor stays on the device: a captured call follows it from replay to
replay.

Bytes: each row is read once and written once, 2 · n · (D + V) elements; no arithmetic. H200 at 4.3 TB/s: 16,384 rows of
512 + 512 float32 in 31 µs; below some thousand rows the two launches are what it costs.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# A program copies tiles of this many elements: 16 bytes a thread of four warps for 16-bit elements, twice that for
# float32. Smaller tiles keep more multiprocessors busy with a few hundred rows.
_TILE = 1024
_WARPS = 4


def fifo_write_(keys: Tensor, values: Tensor, cursor: Tensor, new_keys: Tensor, new_values: Tensor) -> None:
    """See ``memad_fast.fifo_write_``. Any strides; keys and values may differ in dtype."""
    slots, count = keys.shape[0], new_keys.shape[0]
    if count > 0:
        _launch_copy(keys, values, cursor, new_keys, new_values)
    _advance[(1,)](cursor, slots, count, num_warps=1)


def _launch_copy(keys: Tensor, values: Tensor, cursor: Tensor, new_keys: Tensor, new_values: Tensor) -> None:
    slots, count = keys.shape[0], new_keys.shape[0]
    cols = triton.next_power_of_2(min(max(keys.shape[1], values.shape[1], 1), _TILE))
    rows = _TILE // cols
    _write_rows[(triton.cdiv(min(count, slots), rows),)](
        keys, new_keys, *keys.stride(), *new_keys.stride(),
        values, new_values, *values.stride(), *new_values.stride(),
        cursor, slots, count,
        D=keys.shape[1], V=values.shape[1], ROWS=rows, COLS=cols, num_warps=_WARPS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["slots", "count"])
def _write_rows(
    keys, new_keys, keys_row, keys_col, new_keys_row, new_keys_col,
    values, new_values, values_row, values_col, new_values_row, new_values_col,
    cursor, slots, count,
    D: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    first = tl.maximum(count - slots, 0).to(tl.int64)
    row = first + tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    slot = _modulo(_modulo(tl.load(cursor), slots) + first, slots) + (row - first)
    slot = tl.where(slot >= slots, slot - slots, slot)
    live = row < count
    _copy_rows(keys, keys_row, keys_col, slot, new_keys, new_keys_row, new_keys_col, row, live, D, COLS)
    _copy_rows(values, values_row, values_col, slot, new_values, new_values_row, new_values_col, row, live, V, COLS)


@triton.jit
def _copy_rows(
    ring, ring_row, ring_col, slot, new, new_row, new_col, row, live, WIDTH: tl.constexpr, COLS: tl.constexpr
):
    to = ring + slot[:, None] * ring_row
    source = new + row[:, None] * new_row
    for start in range(0, WIDTH, COLS):
        col = (start + tl.arange(0, COLS)).to(tl.int64)[None, :]
        inside = live[:, None] & (col < WIDTH)
        tl.store(to + col * ring_col, tl.load(source + col * new_col, mask=inside), mask=inside)


@triton.jit(do_not_specialize=["slots", "count"])
def _advance(cursor, slots, count):
    tl.store(cursor, _modulo(_modulo(tl.load(cursor), slots) + count, slots))


@triton.jit
def _modulo(value, size):
    """``value`` mod ``size`` in [0, size), as torch's remainder: int64, of any sign."""
    rest = value % size.to(tl.int64)
    return tl.where(rest < 0, rest + size, rest)
