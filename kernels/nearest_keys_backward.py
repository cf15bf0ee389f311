"""The gradients of nearest_keys, for queries and for keys (see memad_fast/ops/nearest_keys.py).

    l2       d = |q - k|²         dd/dq = 2 (q - k)                       dd/dk = -2 (q - k)
    cosine   d = 1 - c            dd/dq = c q / |q|² - k / (|q| |k|)      and with q and k exchanged
    ip       d = q·k              dd/dq = k                               dd/dk = q

Each is a · own + b · other for the row that is differentiated and the other one; a and b hold the gradient of the
distance. For l2 and ip they are that gradient, doubled or as it is; for cosine a kernel of its own computes them for
every slot, three inner products in float64. Then

    queries   ROWS rows × COLS columns a program, over the k slots of each row in order
    keys      ``slot_sums``: every key's slots in order

all in float64, in the order of the slots, as on the CPU (csrc/cpu/nearest_keys_backward_kernel.cpp): products and sums
are rounded one by one (no fused multiply-add), so the bits are the CPU's; of a key with more than 512 slots but for
the last float64 bit.

Bytes: queries N·D·(2 + k) elements; keys: see ``slot_sums``; cosine reads both rows of every slot once more. H200 at
4.3 TB/s: 262,144 float32 queries × 512, k = 1: 0.4 ms. Arithmetic: 3 float64 operations an element, a tenth of that.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memad_fast.kernels import slot_sums

# Elements of a tile of the queries' gradient, 4 a thread: 16 bytes of float32, 32 of the sums.
_TILE = 512
_WARPS = 4
# Slots whose inner products one program makes, 16 columns at a time.
_COSINE_SLOTS = 32

_wide, _weigh, _terms_of = slot_sums.wide, slot_sums.weigh, slot_sums.terms_of


def nearest_keys_backward_query(
    grad_distances: Tensor, query: Tensor, keys: Tensor, indices: Tensor, metric: str
) -> Tensor:
    """Gradient of Σ grad · distance for ``query``."""
    (rows, width), k = query.shape, indices.shape[1]
    out = query.new_empty(query.shape)
    if out.numel() == 0:
        return out
    indices = indices.contiguous()
    weights = _weights(grad_distances, query, keys, indices, metric, of_query=True)
    cols = min(triton.next_power_of_2(width), _TILE)
    tile_rows = _TILE // cols
    _sum_of_query[(triton.cdiv(rows, tile_rows) * triton.cdiv(width, cols),)](
        weights, indices, query, *query.stride(), keys, *keys.stride(), out, rows, keys.shape[0], k,
        KIND=metric, D=width, ROWS=tile_rows, COLS=cols, num_warps=_WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def nearest_keys_backward_keys(
    grad_distances: Tensor, query: Tensor, keys: Tensor, indices: Tensor, metric: str
) -> Tensor:
    """Gradient of Σ grad · distance for ``keys``."""
    out = keys.new_empty(keys.shape)
    indices = indices.contiguous()
    weights = _weights(grad_distances, query, keys, indices, metric, of_query=False)
    slot_sums.sum_by_row(metric, weights, keys, query, indices.shape[1], indices, out)
    return out


def _weights(
    grad_distances: Tensor, query: Tensor, keys: Tensor, indices: Tensor, metric: str, *, of_query: bool
) -> Tensor:
    """What ``slot_sums.weigh`` reads for this metric: [N, k] float32, or [2, N, k] float64."""
    grad = grad_distances.contiguous()
    slots = indices.numel()
    if metric != "cosine" or slots == 0:
        return grad
    weights = torch.empty(2, *indices.shape, dtype=torch.float64, device=query.device)
    _cosine_weights[(triton.cdiv(slots, _COSINE_SLOTS),)](
        grad, indices, query, *query.stride(), keys, *keys.stride(), weights, slots, keys.shape[0], indices.shape[1],
        D=query.shape[1], SLOTS=_COSINE_SLOTS, OF_QUERY=of_query, num_warps=_WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return weights


@triton.jit(do_not_specialize=["rows", "key_count"])
def _sum_of_query(
    weights, indices, query, query_row, query_col, keys, keys_row, keys_col, out, rows, key_count, k,
    KIND: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    blocks: tl.constexpr = (D + COLS - 1) // COLS
    row = program // blocks * ROWS + tl.arange(0, ROWS)
    col = (program % blocks * COLS + tl.arange(0, COLS))[None, :]
    inside = (row < rows)[:, None] & (col < D)
    own = tl.load(query + row[:, None] * query_row + col * query_col, mask=inside, other=0.0)
    total = tl.zeros([ROWS, COLS], tl.float64)
    for rank in range(k):
        slot = row * k + rank
        key = tl.load(indices + slot, mask=row < rows, other=-1)
        found = (key >= 0) & (key < key_count)
        own_weight, other_weight = _weigh(weights, slot, rows.to(tl.int64) * k, found, KIND)
        other = tl.load(keys + key[:, None] * keys_row + col * keys_col, mask=found[:, None] & (col < D), other=0.0)
        terms = _terms_of(own_weight[:, None], own, other_weight[:, None], other, KIND)
        total = tl.where(found[:, None], total + terms, total)
    tl.store(out + row[:, None] * D + col, total.to(tl.float32).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["slots", "key_count"])
def _cosine_weights(
    grad, indices, query, query_row, query_col, keys, keys_row, keys_col, weights, slots, key_count, k,
    D: tl.constexpr, SLOTS: tl.constexpr, OF_QUERY: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0).to(tl.int64) * SLOTS + tl.arange(0, SLOTS)
    key = tl.load(indices + slot, mask=slot < slots, other=-1)
    found = (key >= 0) & (key < key_count)
    query_squares = tl.zeros([SLOTS, 16], tl.float64)
    key_squares = tl.zeros([SLOTS, 16], tl.float64)
    products = tl.zeros([SLOTS, 16], tl.float64)
    for start in range(0, D, 16):
        col = (start + tl.arange(0, 16)).to(tl.int64)[None, :]
        inside = found[:, None] & (col < D)
        q = _wide(tl.load(query + (slot // k)[:, None] * query_row + col * query_col, mask=inside, other=0.0))
        x = _wide(tl.load(keys + key[:, None] * keys_row + col * keys_col, mask=inside, other=0.0))
        query_squares += q * q
        key_squares += x * x
        products += q * x
    query_square, key_square = _total(query_squares, SLOTS), _total(key_squares, SLOTS)
    squares = query_square * key_square
    is_zero = squares == 0.0
    inverse = 1.0 / tl.sqrt(tl.where(is_zero, 1.0, squares))
    own_square = query_square if OF_QUERY else key_square
    own = _total(products, SLOTS) * inverse / tl.where(is_zero, 1.0, own_square)
    g = tl.load(grad + slot, mask=found, other=0.0).to(tl.float64)
    live = slot < slots
    tl.store(weights + slot, g * tl.where(is_zero, 0.0, own), mask=live)
    tl.store(weights + slots + slot, g * tl.where(is_zero, 0.0, -inverse), mask=live)


@triton.jit
def _total(parts, SLOTS: tl.constexpr):
    """[SLOTS, 16] → [SLOTS], halves onto halves: the order of the CPU's float64 sums (nearest_keys_exact.h)."""
    eight = tl.sum(tl.reshape(parts, [SLOTS, 2, 8]), axis=1)
    four = tl.sum(tl.reshape(eight, [SLOTS, 2, 4]), axis=1)
    two = tl.sum(tl.reshape(four, [SLOTS, 2, 2]), axis=1)
    return tl.sum(two, axis=1)
