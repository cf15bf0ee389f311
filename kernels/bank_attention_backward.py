"""The gradients of thresholded attention over partitioned memory banks in Triton.

For a gradient g of the read, sums over the M items of a row, k_j = 1 where w_j is above the threshold:

    dv_j = g . m_j                   dw = renormalize: (dv - sum dv v) / sum w, else dv
    dx_j = p_j (k_j dw_j - sum k p dw)
    dq   = sum_j dx_j dx_j/dq        dm_j = sum over rows of v_j g + dx_j dx_j/dm_j

A program has a run of row blocks of one partition. For each it computes the weights again, as the read does (the same
products of parts, see bank_attention.py), and with them

    Q . bank^T, G . bank^T  ->  v, dx [rows, M]  ->  dq = dx . bank,  sums += v^T . G + dx^T . Q

``sums``, the program's partial gradient of the bank, lies in a workspace: it is larger than what a multiprocessor
holds, and stays in the L2 cache. A last kernel adds them up in order. The runs are cut by shapes alone, so
the sums have one order everywhere. The workspace is at most PARTIAL_BYTES, or one bank in float32.

Counted: 10 N M D operations (16 where the bank is walked over), 6 times that in bfloat16 for float32 inputs. Bytes:
12 N D, and in the L2 cache twice the partial gradient for each block of rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memad_fast.kernels import architecture
from memad_fast.kernels import bank_attention as forward
from memad_fast.kernels.bank_attention import (
    HARD,
    LOWEST,
    SOFT,
    SUM_FLOOR,
    Config,
    against_items,
    exponentials,
    largest,
    load_items,
    load_rows,
    logits,
    product,
    row_offsets,
    row_scales,
    row_sum,
    shrunk,
    split,
    store_rows,
    transposed,
    weight_factor,
    with_tile,
    zeros,
)
from memad_fast.ops.bank_attention import TIE_BAND, _empty_rows_like

PROGRAMS = 128  # partitions x runs aimed at: one for each multiprocessor of an H200
PARTIAL_BYTES = 64 << 20

# With less than Hopper's instructions, which take one factor from shared memory, a row's weights and their gradients
# do not fit the registers beside a product.
CONFIGS = {
    "interpreter": [Config(64, 64, 1, 1, 1024, 256, False)],
    "sm_90": [Config(64, 32, 8, 2, 8, 256, True), Config(64, 32, 8, 1, 8, 64, True)],
    "any": [Config(32, 32, 4, 1, 8, 64, False), Config(16, 16, 4, 1, 8, 64, False)],
}


@triton.jit
def weighted_sum(blocks, others):
    """The sum of each row of blocks * others."""
    total = tl.sum(blocks[0] * others[0], axis=1)
    for i in tl.static_range(1, len(blocks)):
        total += tl.sum(blocks[i] * others[i], axis=1)
    return total


@triton.jit
def factors(total, kept_sum, kept_dv, masked_sum, masked_dv, RENORMALIZE: tl.constexpr):
    """(factor, mean, average): v = kept factor, dx = e factor (k (dv - mean) - average); NaN for a row that has one."""
    factor = weight_factor(total, kept_sum, RENORMALIZE)
    mean = tl.zeros(total.shape, tl.float32)
    if RENORMALIZE:
        mean = tl.where(kept_sum > SUM_FLOOR * total, kept_dv * factor, 0.0)
    return factor, mean, (masked_dv - mean * masked_sum) / total


@triton.jit
def logit_gradients(e, masked, dv, factor, mean, average):
    """dx; ``masked`` is e where its weight is above the threshold, else 0."""
    dx = ()
    for i in tl.static_range(len(e)):
        kept = masked[i] * (dv[i] - mean[:, None])
        dx = dx + ((kept - e[i] * average[:, None]) * factor[:, None],)
    return dx


@triton.jit
def scaled(blocks, by):
    """Every row times its value of ``by``."""
    results = ()
    for i in tl.static_range(len(blocks)):
        results = results + (blocks[i] * by[:, None],)
    return results


@triton.jit
def by_item(blocks, scales):
    """Every column times the scale of its item."""
    results = ()
    item = 0
    for i in tl.static_range(len(blocks)):
        results = results + (blocks[i] * tl.load(scales + item + tl.arange(0, blocks[i].shape[1])),)
        item += blocks[i].shape[1]
    return results


@triton.jit
def add_at(to, values, is_first):
    """Add ``values`` to what lies at ``to``; the first to come finds nothing there yet."""
    is_there = tl.full(values.shape, True, tl.int1) & (is_first == 0)
    tl.store(to, tl.load(to, mask=is_there, other=0.0) + values)


@triton.jit
def add_to_bank(
    sums, alongs, is_first, weights, dx, s, directions, after, rows, grads, row_mask, before,
    D: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROW_PARTS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """sums += weights^T . grads + dx^T . unit rows, alongs += dx^T s, for the items of the blocks.

    An item whose norm is at the floor gets no gradient by dx.
    """
    passed = ()
    at = 0
    for i in tl.static_range(len(dx)):
        j = at + tl.arange(0, dx[i].shape[1])
        add_at(alongs + j, tl.sum(dx[i] * s[i], axis=0), is_first)
        has_direction = tl.load(directions + j) != 0.0
        passed = passed + (tl.where(has_direction, dx[i] * after[:, None], 0.0),)
        at += dx[i].shape[1]
    for column in tl.range(0, D, COLUMNS):
        right = split(load_rows(rows, row_mask, column, D, COLUMNS) * before[:, None], ROW_PARTS, PART)
        grad = split(load_rows(grads, row_mask, column, D, COLUMNS), ROW_PARTS, PART)
        at = 0
        for i in tl.static_range(len(weights)):
            items = at + tl.arange(0, weights[i].shape[1])
            to = sums + (items[:, None] * WIDTH + column + tl.arange(0, COLUMNS))
            added = product(transposed(split(weights[i], 3, PART)), grad)
            added += product(transposed(split(passed[i], 3, PART)), right)
            add_at(to, added, is_first)
            at += weights[i].shape[1]


@triton.jit
def store_query_gradient(
    out, rows, row_mask, column, sums, along, before, after, direction, D: tl.constexpr, COSINE: tl.constexpr
):
    """dot: the sum of dx_j scale_j m_j. cosine: that, less its part along q, over the norm of q."""
    if COSINE:
        unit = load_rows(rows, row_mask, column, D, sums.shape[1]) * before[:, None] * after[:, None]
        sums = (sums - along[:, None] * unit) * direction[:, None]
    store_rows(out, row_mask, column, sums, D)


NOT_SPECIALIZED = [
    *("runs", "count", "inner", "rows_inner", "partitions", "M", "padded", "part_items"),
    *("query_outer", "query_inner", "query_partition", "query_row"),
    *("grad_outer", "grad_inner", "grad_partition", "grad_row"),
    *("out_outer", "out_inner", "out_partition", "out_row"),
]


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def gradient_kernel(
    query, grad, grad_query, bank, last, scales, sums, alongs, threshold, cut, runs,
    count, inner, rows_inner, partitions, M, padded, part_items,
    query_outer, query_inner, query_partition, query_row, grad_outer, grad_inner, grad_partition, grad_row,
    out_outer, out_inner, out_partition, out_row,
    D: tl.constexpr, WIDTH: tl.constexpr, PIECES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ROW_PARTS: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, VECTOR: tl.constexpr, SHRINK: tl.constexpr,
    RENORMALIZE: tl.constexpr, COSINE: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """One run of row blocks of a partition whose items are all in PIECES."""
    partition = (tl.program_id(0) % partitions).to(tl.int64)
    run = (tl.program_id(0) // partitions).to(tl.int64)
    start = partition * padded
    slot = (partition * runs + run) * padded
    blocks = tl.cdiv(count, ROWS)
    begin = run * blocks // runs
    as_it_is = tl.full([ROWS], 1.0, tl.float32)
    for block in tl.range(begin, (run + 1) * blocks // runs, num_stages=1):
        first_row = block * ROWS
        row_mask = tl.arange(0, ROWS) < count - first_row
        rows = query + row_offsets(
            partition * query_partition, first_row, inner, rows_inner, query_outer, query_inner, query_row, ROWS, VECTOR
        )
        grads = grad + row_offsets(
            partition * grad_partition, first_row, inner, rows_inner, grad_outer, grad_inner, grad_row, ROWS, VECTOR
        )
        before, after, direction = row_scales(rows, row_mask, D, COLUMNS, COSINE)
        products = against_items(
            rows, row_mask, before, bank, last, start, part_items, D, WIDTH, PIECES, COLUMNS, ROW_PARTS, PARTS, PART,
            DESCRIPTORS,
        )  # fmt: skip
        dv = against_items(
            grads, row_mask, as_it_is, bank, last, start, part_items, D, WIDTH, PIECES, COLUMNS, ROW_PARTS, PARTS, PART,
            DESCRIPTORS,
        )  # fmt: skip
        x = logits(products, after, scales + start, 0, M)
        e = exponentials(x, largest(x, tl.full([ROWS], LOWEST, tl.float32)))
        total = row_sum(e)
        kept = shrunk(e, total, threshold, cut, SHRINK)
        masked = shrunk(e, total, threshold, cut, HARD if SHRINK == SOFT else SHRINK)
        factor, mean, average = factors(
            total, row_sum(kept), weighted_sum(kept, dv), row_sum(masked), weighted_sum(masked, dv), RENORMALIZE
        )
        dx = by_item(logit_gradients(e, masked, dv, factor, mean, average), scales + start)
        s = scaled(products, after)
        along = weighted_sum(dx, s)
        out = grad_query + row_offsets(
            partition * out_partition, first_row, inner, rows_inner, out_outer, out_inner, out_row, ROWS, VECTOR
        )
        for column in tl.range(0, D, COLUMNS):
            row_sums = zeros(ROWS, COLUMNS)
            item = start
            for i in tl.static_range(len(PIECES)):
                items = load_items(
                    last if i == len(PIECES) - 1 else bank, item, column, part_items, PIECES[i], COLUMNS, WIDTH, PARTS,
                    DESCRIPTORS,
                )  # fmt: skip
                row_sums += product(split(dx[i], 3, PART), items)
                item += PIECES[i]
            store_query_gradient(out, rows, row_mask, column, row_sums, along, before, after, direction, D, COSINE)
        add_to_bank(
            sums + slot * WIDTH, alongs + slot, block == begin, scaled(kept, factor), dx, s,
            scales + part_items + start, after, rows, grads, row_mask, before, D, WIDTH, COLUMNS, ROW_PARTS, PART,
        )  # fmt: skip
        tl.debug_barrier()  # what one thread has added the next block's may find with another


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def gradient_tiles_kernel(
    query, grad, grad_query, bank, scales, sums, alongs, row_sums, threshold, cut, runs,
    count, inner, rows_inner, partitions, M, padded, part_items,
    query_outer, query_inner, query_partition, query_row, grad_outer, grad_inner, grad_partition, grad_row,
    out_outer, out_inner, out_partition, out_row,
    D: tl.constexpr, WIDTH: tl.constexpr, ITEMS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ROW_PARTS: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, VECTOR: tl.constexpr, SHRINK: tl.constexpr,
    RENORMALIZE: tl.constexpr, COSINE: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """The same for any number of items, ITEMS at a time: once for the softmax, once for its sums, once to add up."""
    partition = (tl.program_id(0) % partitions).to(tl.int64)
    run = (tl.program_id(0) // partitions).to(tl.int64)
    start = partition * padded
    slot = (partition * runs + run) * padded
    blocks = tl.cdiv(count, ROWS)
    begin = run * blocks // runs
    as_it_is = tl.full([ROWS], 1.0, tl.float32)
    row_sums += tl.program_id(0).to(tl.int64) * (ROWS * WIDTH)
    for block in tl.range(begin, (run + 1) * blocks // runs, num_stages=1):
        first_row = block * ROWS
        row_mask = tl.arange(0, ROWS) < count - first_row
        rows = query + row_offsets(
            partition * query_partition, first_row, inner, rows_inner, query_outer, query_inner, query_row, ROWS, VECTOR
        )
        grads = grad + row_offsets(
            partition * grad_partition, first_row, inner, rows_inner, grad_outer, grad_inner, grad_row, ROWS, VECTOR
        )
        before, after, direction = row_scales(rows, row_mask, D, COLUMNS, COSINE)
        top = tl.full([ROWS], LOWEST, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        for first in tl.range(0, padded, ITEMS, num_stages=1):
            products = against_items(
                rows, row_mask, before, bank, bank, start + first, part_items, D, WIDTH, (ITEMS,), COLUMNS, ROW_PARTS,
                PARTS, PART, DESCRIPTORS,
            )  # fmt: skip
            x = logits(products, after, scales + start, first, M)
            top, total = with_tile(top, total, x)
        kept_sum = tl.zeros([ROWS], tl.float32)
        kept_dv = kept_sum
        masked_sum = kept_sum
        masked_dv = kept_sum
        for first in tl.range(0, padded, ITEMS, num_stages=1):
            products = against_items(
                rows, row_mask, before, bank, bank, start + first, part_items, D, WIDTH, (ITEMS,), COLUMNS, ROW_PARTS,
                PARTS, PART, DESCRIPTORS,
            )  # fmt: skip
            dv = against_items(
                grads, row_mask, as_it_is, bank, bank, start + first, part_items, D, WIDTH, (ITEMS,), COLUMNS,
                ROW_PARTS, PARTS, PART, DESCRIPTORS,
            )  # fmt: skip
            e = exponentials(logits(products, after, scales + start, first, M), top)
            kept = shrunk(e, total, threshold, cut, SHRINK)
            masked = shrunk(e, total, threshold, cut, HARD if SHRINK == SOFT else SHRINK)
            kept_sum += row_sum(kept)
            kept_dv += weighted_sum(kept, dv)
            masked_sum += row_sum(masked)
            masked_dv += weighted_sum(masked, dv)
        factor, mean, average = factors(total, kept_sum, kept_dv, masked_sum, masked_dv, RENORMALIZE)
        along = tl.zeros([ROWS], tl.float32)
        for first in tl.range(0, padded, ITEMS, num_stages=1):
            products = against_items(
                rows, row_mask, before, bank, bank, start + first, part_items, D, WIDTH, (ITEMS,), COLUMNS, ROW_PARTS,
                PARTS, PART, DESCRIPTORS,
            )  # fmt: skip
            dv = against_items(
                grads, row_mask, as_it_is, bank, bank, start + first, part_items, D, WIDTH, (ITEMS,), COLUMNS,
                ROW_PARTS, PARTS, PART, DESCRIPTORS,
            )  # fmt: skip
            e = exponentials(logits(products, after, scales + start, first, M), top)
            kept = shrunk(e, total, threshold, cut, SHRINK)
            masked = shrunk(e, total, threshold, cut, HARD if SHRINK == SOFT else SHRINK)
            dx = by_item(logit_gradients(e, masked, dv, factor, mean, average), scales + start + first)
            s = scaled(products, after)
            along += weighted_sum(dx, s)
            for column in tl.range(0, D, COLUMNS):
                items = load_items(bank, start + first, column, part_items, ITEMS, COLUMNS, WIDTH, PARTS, DESCRIPTORS)
                to = row_sums + (tl.arange(0, ROWS)[:, None] * WIDTH + column + tl.arange(0, COLUMNS))
                add_at(to, product(split(dx[0], 3, PART), items), first == 0)
            add_to_bank(
                sums + (slot + first) * WIDTH, alongs + slot + first, block == begin, scaled(kept, factor), dx, s,
                scales + part_items + start + first, after, rows, grads, row_mask, before, D, WIDTH, COLUMNS, ROW_PARTS,
                PART,
            )  # fmt: skip
            tl.debug_barrier()  # what one thread has added the next tile's may find with another
        out = grad_query + row_offsets(
            partition * out_partition, first_row, inner, rows_inner, out_outer, out_inner, out_row, ROWS, VECTOR
        )
        for column in tl.range(0, D, COLUMNS):
            added = tl.load(row_sums + (tl.arange(0, ROWS)[:, None] * WIDTH + column + tl.arange(0, COLUMNS)))
            store_query_gradient(out, rows, row_mask, column, added, along, before, after, direction, D, COSINE)
        tl.debug_barrier()


@triton.jit(do_not_specialize=["runs", "M", "padded", "part_items"])
def bank_gradient_kernel(
    sums, alongs, parts, directions, grad_bank, runs, M, padded, part_items,
    D: tl.constexpr, WIDTH: tl.constexpr, ITEMS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
    COSINE: tl.constexpr,
):  # fmt: skip
    """The runs' partial gradients of ITEMS items added in order, less the part along each item."""
    item = tl.program_id(0).to(tl.int64) * ITEMS + tl.arange(0, ITEMS)
    partition = item // padded
    j = item % padded
    mask = (item < part_items) & (j < M)
    slot = partition * runs * padded + j
    along = tl.zeros([ITEMS], tl.float32)
    direction = tl.load(directions + item, mask=mask, other=0.0)
    if COSINE:
        for run in range(runs):
            along += tl.load(alongs + slot + run * padded, mask=mask, other=0.0)
    for column in tl.range(0, D, COLUMNS):
        columns = column + tl.arange(0, COLUMNS)
        total = tl.zeros([ITEMS, COLUMNS], tl.float32)
        for run in range(runs):
            total += tl.load(sums + (slot + run * padded)[:, None] * WIDTH + columns, mask=mask[:, None], other=0.0)
        if COSINE:
            values = tl.zeros([ITEMS, COLUMNS], tl.float32)
            for i in tl.static_range(PARTS - 1, -1, -1):
                at = (item + i * part_items)[:, None] * WIDTH + columns
                values += tl.load(parts + at, mask=mask[:, None], other=0.0).to(tl.float32)
            total -= (along * direction)[:, None] * (values * direction[:, None])
        to = grad_bank + (partition * M + j)[:, None] * D + columns
        tl.store(to, total.to(grad_bank.dtype.element_ty), mask=mask[:, None] & (columns < D))


def runs_of(blocks: int, partitions: int, bank_bytes: int) -> int:
    """Into how many runs the row blocks of each partition are cut; by shapes alone."""
    wanted = min(triton.cdiv(PROGRAMS, partitions), blocks)
    return max(1, min(wanted, PARTIAL_BYTES // bank_bytes))


def gradient_config(query: Tensor, bank: Tensor) -> Config:
    """For this processor and these sizes; the number of rows has no say, so it changes no bit of a row's gradient."""
    parts, (_, items, width) = forward.PARTS[bank.dtype], bank.shape

    def shared_bytes(config: Config) -> int:
        columns, at_once = forward.columns_of(width, config.columns), forward.items_at_once(items, config)
        slices = (parts * at_once + 2 * config.rows * parts) * columns * 2
        return config.stages * slices + 2 * 3 * config.rows * at_once * 2

    return architecture.fitting(CONFIGS, architecture.architecture(query), shared_bytes)


def bank_attention_backward(
    grad: Tensor,
    query: Tensor,
    bank: Tensor,
    threshold: float,
    shrink: str,
    renormalize: bool,
    similarity: str,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """The gradients of ``query`` and ``bank`` for the gradient ``grad`` of the read."""
    grad_query = _empty_rows_like(query)
    grad_bank = torch.empty_like(bank, memory_format=torch.contiguous_format)
    if query.numel() == 0:
        return grad_query, grad_bank.zero_()
    rows, grads, out = forward.Rows.of(query), forward.Rows.of(grad), forward.Rows.of(grad_query)
    partitions, items, width = bank.shape
    config = gradient_config(query, bank)
    columns = forward.columns_of(width, config.columns)
    is_resident = items <= config.resident
    padded = sum(forward.pieces_of(items)) if is_resident else forward.padded_to_pieces(items)
    prepared = forward.prepare(bank, similarity, temperature, padded, columns, config)
    parts, row_width = prepared.parts.shape[0], prepared.parts.shape[-1]
    blocks = triton.cdiv(rows.count, config.rows)
    runs = runs_of(blocks, partitions, 4 * partitions * padded * row_width)
    sums = torch.empty((partitions, runs, padded, row_width), dtype=torch.float32, device=query.device)
    alongs = torch.empty((partitions, runs, padded), dtype=torch.float32, device=query.device)
    is_cosine = similarity == "cosine"
    threshold = min(threshold, 2.0)  # no weight is above 1
    values = (
        threshold, threshold * (1.0 + TIE_BAND), runs, *rows.sizes, *prepared.sizes,
        *rows.strides, *grads.strides, *out.strides,
    )  # fmt: skip
    flags = {
        "D": width, "WIDTH": row_width, "ROWS": config.rows, "COLUMNS": columns,
        "ROW_PARTS": forward.PARTS[query.dtype], "PARTS": parts, "PART": forward.part(),
        "VECTOR": forward.vector(rows, grads, out), "SHRINK": forward.SHRINK[shrink], "RENORMALIZE": renormalize,
        "COSINE": is_cosine, "DESCRIPTORS": config.descriptors, "num_warps": config.warps,
        "num_stages": config.stages,
    }  # fmt: skip
    tensors = rows.tensor, grads.tensor, out.tensor, prepared.block(forward.PIECE, columns, config.descriptors)
    if is_resident:
        pieces = forward.pieces_of(items)
        last = prepared.block(pieces[-1], columns, config.descriptors)
        gradient_kernel[(partitions * runs,)](
            *tensors, last, prepared.scales, sums, alongs, *values, PIECES=pieces, **flags
        )
    else:
        row_sums = torch.empty((partitions * runs, config.rows, row_width), dtype=torch.float32, device=query.device)
        gradient_tiles_kernel[(partitions * runs,)](
            *tensors, prepared.scales, sums, alongs, row_sums, *values, ITEMS=forward.PIECE, **flags
        )
    bank_gradient_kernel[(triton.cdiv(partitions * padded, config.items),)](
        sums, alongs, prepared.parts, prepared.scales[1], grad_bank, runs, *prepared.sizes,
        D=width, WIDTH=row_width, ITEMS=config.items, COLUMNS=columns, PARTS=parts, COSINE=is_cosine, num_warps=1,
    )  # fmt: skip
    out.copy_to(grad_query)
    return grad_query, grad_bank
