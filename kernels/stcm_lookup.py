"""Read of the structure-texture memory (MemSTC-Net, eq. 6): the value beside the nearest key, and its gradient.

    index = argmin_m |q - key_m|² over the filled rows     ``nearest_keys.search``; ``filled`` is read on the device
    read[n] = values[index_n], NaN where there is none     program p: rows [p · ROWS, (p + 1) · ROWS), COLS at a time
    grad_values[m] = Σ grad_read[n] over index_n = m       ``slot_sums``: in the order of the queries, in float64

Bytes beside those of the search: N·V elements read and written; the gradient: N·V read, M·V written and the sort of N
indices. H200 at 4.3 TB/s: 262,144 reads of 512 float32 values in 0.25 ms.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from memad_fast.kernels import nearest_keys, slot_sums

# As for a ring write (fifo_write_.py): a gather is the same copy, the other way.
_TILE = 1024
_WARPS = 4


def stcm_lookup(
    query: Tensor, keys: Tensor, values: Tensor, packed: Tensor | None, filled: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The op ``stcm_lookup``."""
    found = nearest_keys.search(query, keys, packed, 1, "l2", filled)
    distances, indices = found.distances.flatten(), found.indices.flatten()
    count, width = query.shape[0], values.shape[1]
    read = values.new_empty(count, width)
    if read.numel() > 0:
        cols = triton.next_power_of_2(min(width, _TILE))
        rows = _TILE // cols
        _read_rows[(triton.cdiv(count, rows),)](
            indices, values, *values.stride(), read, count, V=width, ROWS=rows, COLS=cols, num_warps=_WARPS
        )
    return read, distances, indices


@triton.jit(do_not_specialize=["count"])
def _read_rows(
    indices, values, values_row, values_col, read, count, V: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    index = tl.load(indices + row, mask=row < count, other=-1)[:, None]
    for start in range(0, V, COLS):
        col = (start + tl.arange(0, COLS)).to(tl.int64)[None, :]
        value = tl.load(
            values + index * values_row + col * values_col, mask=(index >= 0) & (col < V), other=float("nan")
        )
        tl.store(read + row[:, None] * V + col, value, mask=(row < count)[:, None] & (col < V))


def stcm_lookup_backward_values(grad_read: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    """The op ``stcm_lookup_backward_values``."""
    out = values.new_empty(values.shape)
    slot_sums.sum_by_row("sum", grad_read, values, grad_read, 1, indices, out)
    return out
