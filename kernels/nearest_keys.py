"""The k nearest keys of each query, exactly: int8 products rule most keys out, float64 decides between the others.

The score of a key and its ends are those of csrc/cpu/README_nearest_keys.md; kernels/README_nearest_keys.md tells what
differs:

    c(q, k)  = base - b a (codes_q . codes_k)                       of every pair, by tensor cores
    e(q, g)  = |q'| max residual + |w| max norm                     over the keys of a group g of 32
    lower(g) = min c - e    upper(g) = min c + e + 2 max slack + own
    T        = the smallest upper(g) so far (k > 1: the k-th smallest of all)
    word(g)  = the keys of g with c - e <= T: every other key is surely not among the k nearest

    stage    a pass over the queries: codes, norms and errors (prepare_keys.py)
    screen   a program owns 128 queries and walks over the key tiles of its split: all dimensions, then the ends

                 keys      [128][32 groups x 4]        ends [queries][groups][2]: lower, word
        queries  [128]     int32 sums -> c -> min, word        no list, no count, no order to keep: what a group
                                                               has to say takes 8 bytes wherever it lies
    exact    per query the words of groups with lower <= T, in float64 (nearest_keys_exact.py)

k > 1 screens twice: for the upper ends, of which torch finds the k-th smallest, then for the words.
Queries are searched in chunks, so that the ends (M / 4 bytes a query) stay within ``Limits.workspace``.

Per tile of 128 x 128 and D = 128 (H200): products 512 cycles of the tensor cores at their limit; ends 7 instructions a
pair, 722 a warp, 1,440 cycles of the schedulers, while another program's products run. Bytes: (128 + 128) D from the L2
cache for 128 x 128 x D products, for D <= 128 only the keys'.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from memad_fast.kernels import architecture, prepare_keys
from memad_fast.kernels import nearest_keys_exact as exact

# Dimensions of which a sum of products of codes fits int32.
_MOST_CODED = 65_536
_QUERY_NUMBERS = 5

# What a screen is for: k = 1, whose threshold it lowers as it goes; k > 1: the upper ends of all groups, then, with the
# threshold that follows from them, the keys.
_RUNNING = tl.constexpr(0)
_UPPERS = tl.constexpr(1)
_FIXED = tl.constexpr(2)


@dataclass(frozen=True)
class Tile:
    """How the screen is cut: a program takes ``queries`` rows, and ``keys`` of its split at a time."""

    queries: int
    keys: int
    depth: int
    """Dimensions of a step."""
    num_warps: int
    num_stages: int
    registers: int = 0
    """Of a thread at most, so that two programs share a multiprocessor; 0 leaves it to the compiler."""

    def shared_bytes(self, processor: architecture.Architecture) -> int:
        """The stages, of which only wgmma keeps all in shared memory, and what moves between layouts."""
        stages = self.num_stages if processor.name == "sm_90" else self.num_stages - 1
        return stages * (self.queries + self.keys) * self.depth + (8 << 10)

    @property
    def options(self) -> dict[str, int]:
        """Of a launch."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options | {"maxnreg": self.registers} if self.registers else options


# For more than 64 queries, and for fewer. While one program of a multiprocessor judges its scores, the tensor cores
# work for another: that takes 128 registers of 256 threads, with wgmma; without it the same cap spills.
_TILES = {
    "sm_90": [Tile(128, 128, 128, 8, 3, registers=128)],
    "any": [Tile(128, 128, 128, 8, 3)],
    "gfx90a": [Tile(128, 128, 128, 8, 2)],
    "gfx942": [Tile(128, 128, 128, 8, 2)],
}
_FEW = {
    "any": [Tile(64, 128, 128, 4, 3)],
    "gfx90a": [Tile(64, 128, 128, 4, 2)],
    "gfx942": [Tile(64, 128, 128, 4, 2)],
}


@dataclass(frozen=True)
class Turns:
    """How the exact stage is cut: ``queries`` of a program, ``block`` groups of each at a time."""

    queries: int
    block: int


@dataclass(frozen=True)
class Limits:
    """Sizes that bound memory and cut the work; tests make them small to reach every path with small inputs."""

    workspace: int = 64 << 20
    """Bytes that the queries of one chunk take; but at least 64 queries, 16 bytes a key."""
    screen_programs: int = 4
    """A screen is cut into splits of the keys until it has so many programs a multiprocessor."""
    exact_programs: int = 32
    """The same of the exact stage."""


LIMITS = Limits()


def _turns(processor: architecture.Architecture) -> Turns:
    # The interpreter's cost is per call, not per value.
    return Turns(64, 128) if processor.name == "interpreter" else Turns(4, 64)


def _tile(processor: architecture.Architecture, width: int, count: int) -> Tile:
    tile = architecture.fitting(_FEW if count <= 64 else _TILES, processor, lambda tile: tile.shared_bytes(processor))
    return tile if width % tile.depth == 0 else replace(tile, depth=tile.depth // 2)


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
    numbers,  # [5, padded_count]: scale of the codes, upper ends of |q'| and |w|, what every upper end adds; threshold
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
def _largest_of_groups(numbers, maxima, padded, BLOCK: tl.constexpr):
    """The largest residual, norm and slack of each group of keys."""
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    padded = padded.to(tl.int64)
    groups = padded // exact.GROUP
    key = group[:, None] * exact.GROUP + tl.arange(0, exact.GROUP)[None, :]
    for number in tl.static_range(3):
        value = tl.load(numbers + (number + 2) * padded + key, mask=key < padded, other=0.0)
        tl.store(maxima + number * groups + group, tl.max(value, axis=1), mask=group < groups)


@triton.jit
def _judge(
    products,  # [BM, BN] of codes
    threshold,  # [BM]
    query_numbers,  # [BM] pointers
    padded_count,
    numbers,  # of the first key of the tile
    padded,
    maxima,  # of the first group of the tile
    keys_left,  # if CUT: how many of the tile's keys are searched
    ends,  # [BM] pointers to the first group of the tile
    MODE: tl.constexpr,
    CUT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Lower and upper ends of a tile's groups; returns the new threshold."""
    GROUPS: tl.constexpr = BN // exact.GROUP
    # Loaded for every tile: registers are what two programs a multiprocessor lack.
    scale = tl.load(query_numbers)
    norm = tl.load(query_numbers + padded_count)
    residual = tl.load(query_numbers + 2 * padded_count)
    if MODE == _FIXED:
        threshold = tl.load(query_numbers + 4 * padded_count)
    else:
        own = tl.load(query_numbers + 3 * padded_count)
    column = tl.arange(0, BN)
    base = tl.load(numbers + column)
    if CUT:
        base = tl.where(column < keys_left, base, float("inf"))
    key_scale = tl.load(numbers + padded + column)
    group = tl.arange(0, GROUPS)
    groups = padded // exact.GROUP
    key_residual = tl.load(maxima + group)
    key_norm = tl.load(maxima + groups + group)
    slack = tl.load(maxima + 2 * groups + group)

    score = base[None, :] - scale[:, None] * (products.to(tl.float32) * key_scale[None, :])
    score = tl.reshape(score, [BM, GROUPS, exact.GROUP])
    best = tl.min(score, axis=2)
    # Enlarged by what the roundings of a sum with it may take away.
    error = (norm[:, None] * key_residual[None, :] + residual[:, None] * key_norm[None, :]) * (1.0 + 2.0**-18)
    if MODE != _FIXED:
        upper = best + (error + (slack * (2.0 + 2.0**-17))[None, :]) + own[:, None]
        upper += tl.abs(upper) * 2.0**-20
        upper = tl.where((slack < float("inf"))[None, :], upper, float("inf"))
    if MODE == _UPPERS:
        tl.store(ends[:, None] + 2 * group[None, :], upper.to(tl.int32, bitcast=True))
    else:
        if MODE == _RUNNING:
            threshold = tl.minimum(threshold, tl.min(upper, axis=1))
        # Below infinity, so that a key which is never returned stays out.
        limit = tl.minimum(threshold[:, None] + error, exact.LARGEST)
        bits = tl.full([exact.GROUP], 1, tl.int32) << tl.arange(0, exact.GROUP)
        word = tl.sum(tl.where(score <= limit[:, :, None], bits[None, None, :], 0), axis=2)
        pair = tl.join((best - error).to(tl.int32, bitcast=True), word)
        tl.store(ends[:, None, None] + (2 * group[:, None] + tl.arange(0, 2)[None, :])[None, :, :], pair)
    return threshold


@triton.jit(do_not_specialize=["padded_count", "key_count", "row_tiles", "split_tiles"])
def _screen(
    query_codes,
    query_numbers,
    padded_count,
    key_codes,
    key_numbers,
    padded,
    maxima,  # [3, padded / 32]: of residual, norm and slack of each group
    key_count,
    filled,
    row_tiles,
    split_tiles,
    ends,  # [padded_count, groups, 2]: lower end and word of each group; MODE uppers: upper end and nothing
    groups,
    thresholds,  # [splits, padded_count], written in MODE running
    MODE: tl.constexpr,
    DP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    STEPS: tl.constexpr = DP // BK
    split = tl.program_id(0) // row_tiles
    first_row = (tl.program_id(0) % row_tiles).to(tl.int64) * BM
    row = first_row + tl.arange(0, BM)
    searched = key_count.to(tl.int64)
    if filled is not None:
        searched = tl.minimum(tl.maximum(tl.load(filled), 0), searched)
    first_tile = split * split_tiles
    last_tile = tl.minimum(first_tile + split_tiles, tl.cdiv(searched, BN).to(tl.int32))

    threshold = tl.full([BM], float("inf"), tl.float32)
    depth = tl.arange(0, BK)
    query_codes += first_row * DP
    query_tile = tl.arange(0, BM)[:, None] * DP + depth[None, :]
    key_tile = tl.arange(0, BN)[:, None] * DP + depth[None, :]
    row_ends = ends + row * (2 * groups)
    products = tl.zeros([BM, BN], tl.int32)
    q = tl.load(query_codes + query_tile)
    tile = first_tile
    at = 0
    for _ in range(0, (last_tile - first_tile) * STEPS):
        if STEPS > 1:
            q = tl.load(query_codes + at + query_tile)
        first_key = tile.to(tl.int64) * BN
        key = tl.load(key_codes + (first_key * DP + at) + key_tile)
        products = tl.dot(q, tl.trans(key), products, out_dtype=tl.int32)
        is_last = at == DP - BK
        if is_last:
            first_group = first_key // exact.GROUP
            threshold = _judge(
                products,
                threshold,
                query_numbers + row,
                padded_count,
                key_numbers + first_key,
                padded,
                maxima + first_group,
                (searched - first_key).to(tl.int32),
                row_ends + 2 * first_group,
                MODE,
                filled is not None,
                BM,
                BN,
            )
            products = tl.zeros([BM, BN], tl.int32)
        tile = tl.where(is_last, tile + 1, tile)
        at = tl.where(is_last, 0, at + BK)
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
    if count == 0:
        return result
    query, keys = prepare_keys.with_unit_columns(query), prepare_keys.with_unit_columns(keys)
    maxima = torch.empty(3, layout.rows // exact.GROUP.value, dtype=torch.float32, device=query.device)
    _largest_of_groups[(triton.cdiv(maxima.shape[1], 32),)](layout.parts(packed)[1], maxima, layout.rows, BLOCK=32)
    rows = _chunk_rows(layout, k)
    for first in range(0, count, rows):
        chunk = Search(*(part[first : first + rows] for part in result))
        _search_chunk(query, first, keys, packed, maxima, metric, filled, chunk)
    return result


def _chunk_rows(layout: prepare_keys.Layout, k: int) -> int:
    bytes_per_row = 8 * _groups(layout) + layout.width + 64 + (16 * k if k > 1 else 0)
    rows = LIMITS.workspace // bytes_per_row
    return rows // 128 * 128 or 64  # the smallest tile, however long its rows of ends are


def _groups(layout: prepare_keys.Layout) -> int:
    """Groups of a row in the workspace; a multiple of 16, so that the ends of a tile's groups are stored at once."""
    return triton.cdiv(layout.rows // exact.GROUP.value, 16) * 16


def _search_chunk(
    query: Tensor,
    first: int,
    keys: Tensor,
    packed: Tensor,
    maxima: Tensor,
    metric: str,
    filled: Tensor | None,
    result: Search,
) -> None:
    """Fills ``result`` for its queries, which are those from ``first``."""
    count, k = result.indices.shape
    key_count, dim = keys.shape
    layout, error = prepare_keys.Layout.of(key_count, dim), prepare_keys.Errors.of(dim)
    key_codes, key_numbers, centre = layout.parts(packed)
    groups = _groups(layout)
    device = query.device
    processor = architecture.architecture(query)

    tile = _tile(processor, layout.width, count)
    padded_count = triton.cdiv(count, tile.queries) * tile.queries
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
    ends = thresholds = None
    if dim <= _MOST_CODED:
        row_tiles = triton.cdiv(count, tile.queries)
        key_tiles = layout.rows // tile.keys
        splits = max(1, min(LIMITS.screen_programs * processor.multiprocessors // row_tiles, key_tiles))
        split_tiles = triton.cdiv(key_tiles, splits)
        splits = triton.cdiv(key_tiles, split_tiles)
        ends = torch.empty(padded_count, groups, 2, dtype=torch.int32, device=device)

        def screen(thresholds: Tensor, mode: int) -> None:
            _screen[(row_tiles * splits,)](
                codes,
                numbers,
                padded_count,
                key_codes,
                key_numbers,
                layout.rows,
                maxima,
                key_count,
                filled,
                row_tiles,
                split_tiles,
                ends,
                groups,
                thresholds,
                MODE=mode,
                DP=layout.width,
                BM=tile.queries,
                BN=tile.keys,
                BK=tile.depth,
                **tile.options,
            )

        if k == 1:
            thresholds = torch.empty(splits, padded_count, dtype=torch.float32, device=device)
            screen(thresholds, _RUNNING.value)
        else:
            thresholds = numbers[4:].fill_(torch.inf)
            used = triton.cdiv(key_count, exact.GROUP.value)
            if k <= used:
                uppers = ends.view(torch.float32)[:count, :used, 0]
                if filled is not None:
                    uppers.fill_(torch.inf)
                screen(thresholds, _UPPERS.value)
                thresholds[0, :count] = uppers.topk(k, dim=1, largest=False).values[:, -1]
            screen(thresholds, _FIXED.value)
            splits = 1

    turns = _turns(processor)
    programs = triton.cdiv(count, turns.queries)
    segments = max(1, min(LIMITS.exact_programs * processor.multiprocessors // programs, groups // turns.block))
    segment_groups = triton.cdiv(triton.cdiv(groups, segments), turns.block) * turns.block
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
        ends,
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
        QUERIES=turns.queries,
        BLOCK=turns.block,
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
