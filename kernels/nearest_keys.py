"""The k nearest keys of each query, exactly: int8 products rule most keys out, float64 decides between the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from memad_fast.kernels import architecture, prepare_keys
from memad_fast.kernels import nearest_keys_exact as exact

# Dimensions of which a sum of products of codes fits int32.
_MOST_CODED = 65_536
_QUERY_NUMBERS = 4

# What a screen is for: k = 1, whose threshold it lowers as it goes; k > 1: the upper ends of all groups, then, with the
# threshold that follows from them, the keys.
_RUNNING = tl.constexpr(0)
_UPPERS = tl.constexpr(1)
_FIXED = tl.constexpr(2)


@dataclass(frozen=True)
class Limits:
    """Sizes that bound memory and cut the work; tests make them small to reach every path with small inputs."""

    workspace: int = 64 << 20
    """Bytes of groups' ends and words, for the queries of one chunk."""
    screen_programs: int = 4
    """A screen is cut into splits of the keys until it has so many programs a multiprocessor."""
    exact_programs: int = 32
    """The same of the exact stage."""


LIMITS = Limits()


class Search(NamedTuple):
    """What a search found, and what it took."""

    distances: Tensor
    """[N, k] float32; NaN where there is no key."""
    indices: Tensor
    """[N, k] int64, best first; -1 where there is no key."""
    survivors: Tensor
    """[N] int64: keys computed in float64."""
    full_path: Tensor
    """[N] bool: whether codes could not hold the query, or left more than a sixteenth of the keys."""


@triton.jit(do_not_specialize=["first", "count", "padded_count"])
def _stage(
    query,
    query_stride,
    first,
    count,
    centre,
    centre_norm,  # only for cosine
    codes,  # [padded_count, DP]
    numbers,  # [4, padded_count]: scale of the codes, upper ends of |q'| and of |w|, what every upper end adds
    states,  # [padded_count]
    shifts,  # [padded_count]: an exact value to an upper end of its score
    padded_count,
    METRIC: tl.constexpr,
    SQUARE_ERROR: tl.constexpr,
    EXACT_ERROR: tl.constexpr,
    ELEMENT: tl.constexpr,
    UNDERFLOW: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    CODED: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < count
    pointers = query + (first + row) * query_stride
    finite, screened, scale, square, norm, residual, unit = prepare_keys.quantise_rows(
        pointers,
        inside,
        centre,
        codes + row * DP,
        inside,
        SQUARE_ERROR,
        UNDERFLOW,
        D,
        DP,
        METRIC == "cosine",
        METRIC == "l2",
        ROWS,
        BLOCK,
    )
    screened = screened & CODED
    shift = tl.zeros_like(norm)
    if METRIC == "l2":
        shift = (
            -0.5 * square * (1.0 - 16.0 * prepare_keys.UNIT32_ - 2.0 * SQUARE_ERROR - 8.0 * EXACT_ERROR)
            + norm * ELEMENT
            + ABSOLUTE
        )
    elif METRIC == "cosine":
        columns = tl.arange(0, BLOCK)
        products = tl.zeros([ROWS, BLOCK], tl.float64)
        for start in range(0, D, BLOCK):
            in_row = start + columns < D
            x = tl.load(
                pointers[:, None] + (start + columns)[None, :], mask=inside[:, None] & in_row[None, :], other=0.0
            )
            c = tl.load(centre + start + columns, mask=in_row, other=0.0).to(tl.float64)
            products += x.to(tl.float64) * unit[:, None] * c[None, :]
        of_centre = tl.load(centre_norm)
        shift = tl.sum(products, axis=1) + 8.0 * prepare_keys.UNIT32_ * norm * of_centre - 1.0
        shift += (norm + of_centre) * ELEMENT + ABSOLUTE
    numbers += row
    tl.store(numbers, tl.where(screened, scale, 0.0), mask=inside)
    tl.store(numbers + padded_count, tl.where(screened, prepare_keys.round_up(norm), 0.0), mask=inside)
    tl.store(numbers + 2 * padded_count, tl.where(screened, prepare_keys.round_up(residual), 0.0), mask=inside)
    above = prepare_keys.round_up(norm).to(tl.float64)
    own = (4.0 * EXACT_ERROR * above * above + ABSOLUTE + 64.0 * prepare_keys.TINY_) * (1.0 + 2.0**-18)
    tl.store(numbers + 3 * padded_count, tl.where(screened, prepare_keys.round_up(own), 0.0), mask=inside)
    tl.store(shifts + row, tl.where(screened, prepare_keys.round_up(shift), 0.0), mask=inside)
    state = tl.where(screened, prepare_keys.SCREENED, prepare_keys.ALL_KEYS)
    tl.store(states + row, tl.where(finite, state, prepare_keys.NOT_FINITE), mask=inside)


@triton.jit
def _judge(
    products,  # [BM, BN] of codes
    threshold,  # [BM]
    scale,
    norm,
    residual,
    own,
    numbers,  # of the first key of the tile
    padded,
    keys_left,
    lows,  # [BM, 1] pointers to the group of the first key
    words,
    MODE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Lower and upper ends of a tile's groups; returns the new threshold."""
    GROUPS: tl.constexpr = BN // exact.GROUP
    column = tl.arange(0, BN)
    base = tl.load(numbers + column)
    base = tl.where(column < keys_left, base, float("inf"))
    key_scale = tl.load(numbers + padded + column)
    by_group = tl.arange(0, GROUPS)[:, None] * exact.GROUP + tl.arange(0, exact.GROUP)[None, :]
    key_residual = tl.max(tl.load(numbers + 2 * padded + by_group), axis=1)
    key_norm = tl.max(tl.load(numbers + 3 * padded + by_group), axis=1)
    slack = tl.max(tl.load(numbers + 4 * padded + by_group), axis=1)

    score = base[None, :] - scale[:, None] * (products.to(tl.float32) * key_scale[None, :])
    score = tl.reshape(score, [BM, GROUPS, exact.GROUP])
    best = tl.min(score, axis=2)
    # Enlarged by what the roundings of a sum with it may take away.
    error = (norm[:, None] * key_residual[None, :] + residual[:, None] * key_norm[None, :]) * (1.0 + 2.0**-18)
    group = tl.arange(0, GROUPS)[None, :]
    if MODE != _FIXED:
        upper = best + (error + (slack * (2.0 + 2.0**-17))[None, :]) + own[:, None]
        upper += tl.abs(upper) * 2.0**-20
        upper = tl.where((slack < float("inf"))[None, :], upper, float("inf"))
    if MODE == _UPPERS:
        tl.store(lows + group, upper)
    else:
        if MODE == _RUNNING:
            threshold = tl.minimum(threshold, tl.min(upper, axis=1))
        # Below infinity, so that a key which is never returned stays out.
        limit = tl.minimum(threshold[:, None] + error, exact.LARGEST)
        bits = tl.full([exact.GROUP], 1, tl.int32) << tl.arange(0, exact.GROUP)
        word = tl.sum(tl.where(score <= limit[:, :, None], bits[None, None, :], 0), axis=2)
        tl.store(lows + group, best - error)
        tl.store(words + group, word)
    return threshold


@triton.jit(do_not_specialize=["padded_count", "key_count", "row_tiles", "split_tiles"])
def _screen(
    query_codes,
    query_numbers,
    padded_count,
    key_codes,
    key_numbers,
    padded,
    key_count,
    filled,
    row_tiles,
    split_tiles,
    lows,  # [padded_count, groups]; MODE uppers: the upper ends
    words,
    groups,
    thresholds,  # [splits, padded_count]; MODE fixed: [padded_count], read
    MODE: tl.constexpr,
    DP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    STEPS: tl.constexpr = DP // BK
    split = tl.program_id(0) // row_tiles
    row = (tl.program_id(0) % row_tiles).to(tl.int64) * BM + tl.arange(0, BM)
    searched = key_count.to(tl.int64)
    if filled is not None:
        searched = tl.minimum(tl.maximum(tl.load(filled), 0), searched)
    first_tile = split.to(tl.int64) * split_tiles
    last_tile = tl.minimum(first_tile + split_tiles, tl.cdiv(searched, BN))

    scale = tl.load(query_numbers + row)
    norm = tl.load(query_numbers + padded_count + row)
    residual = tl.load(query_numbers + 2 * padded_count + row)
    own = tl.load(query_numbers + 3 * padded_count + row)
    threshold = tl.full([BM], float("inf"), tl.float32)
    if MODE == _FIXED:
        threshold = tl.load(thresholds + row)
    depth = tl.arange(0, BK)
    query_tile = query_codes + row[:, None] * DP + depth[None, :]
    key_tile = key_codes + tl.arange(0, BN)[:, None] * DP + depth[None, :]
    low_rows = lows + row[:, None] * groups
    word_rows = words + row[:, None] * groups
    products = tl.zeros([BM, BN], tl.int32)
    for step in range(first_tile * STEPS, last_tile * STEPS):
        tile = step // STEPS
        at = step % STEPS * BK
        q = tl.load(query_tile + at)
        key = tl.load(key_tile + (tile * BN * DP + at))
        products = tl.dot(q, tl.trans(key), products, out_dtype=tl.int32)
        if step % STEPS == STEPS - 1:
            at_group = tile * (BN // exact.GROUP)
            threshold = _judge(
                products,
                threshold,
                scale,
                norm,
                residual,
                own,
                key_numbers + tile * BN,
                padded,
                searched - tile * BN,
                low_rows + at_group,
                word_rows + at_group,
                MODE,
                BM,
                BN,
            )
            products = tl.zeros([BM, BN], tl.int32)
    if MODE == _RUNNING:
        tl.store(thresholds + split * padded_count + row, threshold)


def nearest_keys(query: Tensor, keys: Tensor, packed: Tensor | None, k: int, metric: str) -> tuple[Tensor, Tensor]:
    """The op ``nearest_keys``."""
    found = search(query, keys, packed, k, metric)
    return found.distances, found.indices


def nearest_keys_stats(
    query: Tensor, keys: Tensor, packed: Tensor | None, k: int, metric: str
) -> tuple[Tensor, Tensor]:
    """The op ``nearest_keys_stats``."""
    found = search(query, keys, packed, k, metric)
    return found.survivors, found.full_path


def search(
    query: Tensor, keys: Tensor, packed: Tensor | None, k: int, metric: str, filled: Tensor | None = None
) -> Search:
    """The k nearest of keys[:filled] for each query, exactly; waits for nothing.

    Args:
        query: [N, D], float32, float16 or bfloat16, any strides.
        keys: [M, D], the same dtype, any strides; M >= 1.
        packed: ``prepare_keys`` of these keys for this metric, or None: then they are packed here.
        k: 1 to M.
        metric: "l2", "cosine" or "ip".
        filled: None, or an int64 tensor with one element on the device, clamped to [0, M].

    Returns:
        Fresh contiguous tensors. Slots beyond the finite keys, and those of a query that is not finite, hold NaN, -1.

    Raises:
        ValueError: ``packed`` has not the size of packed keys of this shape.
    """
    layout = prepare_keys.Layout.of(*keys.shape)
    if packed is None:
        packed = prepare_keys.prepare_keys(keys, metric)
    prepare_keys.check_packed(packed, keys)
    count = query.shape[0]
    result = Search(
        torch.empty(count, k, dtype=torch.float32, device=query.device),
        torch.empty(count, k, dtype=torch.int64, device=query.device),
        torch.empty(count, dtype=torch.int64, device=query.device),
        torch.empty(count, dtype=torch.bool, device=query.device),
    )
    query, keys = prepare_keys.with_unit_columns(query), prepare_keys.with_unit_columns(keys)
    rows = _chunk_rows(layout, k)
    for first in range(0, count, rows):
        chunk = Search(*(part[first : first + rows] for part in result))
        _search_chunk(query, first, keys, packed, metric, filled, chunk)
    return result


def _chunk_rows(layout: prepare_keys.Layout, k: int) -> int:
    bytes_per_row = 8 * _groups(layout) + layout.width + 64 + (16 * k if k > 1 else 0)
    return max(LIMITS.workspace // bytes_per_row // _ROW_ALIGNMENT, 1) * _ROW_ALIGNMENT


def _groups(layout: prepare_keys.Layout) -> int:
    """Groups of a row in the workspace; a multiple of 16, so that the ends of a tile's groups are stored at once."""
    return triton.cdiv(layout.rows // exact.GROUP.value, 16) * 16


def _search_chunk(
    query: Tensor, first: int, keys: Tensor, packed: Tensor, metric: str, filled: Tensor | None, result: Search
) -> None:
    """Fills ``result`` for its queries, which are those from ``first``."""
    count, k = result.indices.shape
    key_count, dim = keys.shape
    layout, error = prepare_keys.Layout.of(key_count, dim), prepare_keys.Errors.of(dim)
    key_codes, key_numbers, centre = layout.parts(packed)
    groups = _groups(layout)
    device = query.device
    processor = architecture.architecture(query)

    padded_count = triton.cdiv(count, _ROW_ALIGNMENT) * _ROW_ALIGNMENT
    codes = torch.empty(padded_count, layout.width, dtype=torch.int8, device=device)
    numbers = torch.empty(_QUERY_NUMBERS, padded_count, dtype=torch.float32, device=device)
    states = torch.empty(padded_count, dtype=torch.int32, device=device)
    shifts = torch.empty(padded_count, dtype=torch.float32, device=device)
    config = prepare_keys.Config.of(query, layout.width)
    _stage[(triton.cdiv(count, config.rows),)](
        query,
        query.stride(0),
        first,
        count,
        centre,
        torch.linalg.vector_norm(centre, dtype=torch.float64) if metric == "cosine" else None,
        codes,
        numbers,
        states,
        shifts,
        padded_count,
        metric,
        error.square,
        error.exact,
        error.element,
        error.underflow,
        error.absolute,
        CODED=dim <= _MOST_CODED,
        D=dim,
        DP=layout.width,
        ROWS=config.rows,
        BLOCK=config.block,
        num_warps=config.num_warps,
    )

    splits = 0
    lows = words = thresholds = None
    if dim <= _MOST_CODED:
        tile = _tile(processor, layout.width, count)
        row_tiles = triton.cdiv(count, tile.queries)
        key_tiles = layout.rows // tile.keys
        splits = max(1, min(LIMITS.screen_programs * processor.multiprocessors // row_tiles, key_tiles))
        split_tiles = triton.cdiv(key_tiles, splits)
        splits = triton.cdiv(key_tiles, split_tiles)
        lows = torch.empty(padded_count, groups, dtype=torch.float32, device=device)
        words = torch.empty(padded_count, groups, dtype=torch.int32, device=device)

        def screen(thresholds: Tensor, mode: int) -> None:
            _screen[(row_tiles * splits,)](
                codes,
                numbers,
                padded_count,
                key_codes,
                key_numbers,
                layout.rows,
                key_count,
                filled,
                row_tiles,
                split_tiles,
                lows,
                words,
                groups,
                thresholds,
                MODE=mode,
                DP=layout.width,
                BM=tile.queries,
                BN=tile.keys,
                BK=tile.depth,
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
            )

        if k == 1:
            thresholds = torch.empty(splits, padded_count, dtype=torch.float32, device=device)
            screen(thresholds, _RUNNING.value)
        else:
            thresholds = torch.full((1, padded_count), torch.inf, device=device)
            used = triton.cdiv(key_count, exact.GROUP.value)
            if k <= used:
                if filled is not None:
                    lows.fill_(torch.inf)
                screen(thresholds, _UPPERS.value)
                thresholds[0, :count] = lows[:count, :used].topk(k, dim=1, largest=False).values[:, -1]
            screen(thresholds, _FIXED.value)
            splits = 1

    programs = triton.cdiv(count, _EXACT.queries)
    segments = max(1, min(LIMITS.exact_programs * processor.multiprocessors // programs, groups // _EXACT.block))
    segment_groups = triton.cdiv(triton.cdiv(groups, segments), _EXACT.block) * _EXACT.block
    segments = triton.cdiv(groups, segment_groups)
    values = torch.empty(count, segments * k, dtype=torch.float64, device=device)
    indices = torch.empty(count, segments * k, dtype=torch.int64, device=device)
    computed = torch.empty(count, segments, dtype=torch.int64, device=device)
    exact.compute_candidates[(programs * segments,)](
        query,
        query.stride(0),
        keys,
        keys.stride(0),
        key_count,
        filled,
        first,
        count,
        states,
        shifts,
        thresholds,
        splits,
        padded_count,
        lows,
        words,
        groups,
        segments,
        segment_groups,
        k,
        values,
        indices,
        computed,
        METRIC=metric,
        EXACT_ERROR=error.exact,
        D=dim,
        ONE=k == 1,
        QUERIES=_EXACT.queries,
        BLOCK=_EXACT.block,
        BEST_BLOCK=min(triton.next_power_of_2(k), 256),
        num_warps=1,
        enable_fp_fusion=False,
    )
    if k > 1:
        order = indices.argsort(dim=1)
        values, by_value = values.gather(1, order).sort(dim=1, stable=True)
        indices = indices.gather(1, order).gather(1, by_value)
    exact.write_results[(triton.cdiv(count, 128),)](
        values,
        indices,
        computed,
        states,
        key_count,
        filled,
        count,
        segments,
        k,
        segments * k,
        result.distances,
        result.indices,
        result.survivors,
        result.full_path,
        METRIC=metric,
        ONE=k == 1,
        QUERIES=128,
        BLOCK=min(triton.next_power_of_2(k), 16),
    )


@dataclass(frozen=True)
class Tile:
    """How the screen is cut."""

    queries: int
    keys: int
    depth: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Turns:
    """How the exact stage is cut."""

    queries: int
    block: int


_ROW_ALIGNMENT = 128
_EXACT = Turns(4, 128)


def _tile(processor: architecture.Architecture, width: int, count: int) -> Tile:
    depth = 128 if width % 128 == 0 else 64
    stages = 2 if processor.name.startswith("gfx") else 3
    return Tile(64 if count <= 64 else 128, 128, depth, 4 if count <= 64 else 8, stages)
