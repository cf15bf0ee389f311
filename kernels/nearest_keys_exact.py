"""The exact stage of nearest_keys: the keys that the screen could not rule out, in float64, from the original rows.

A program takes QUERIES rows and walks over their groups of 32 keys, BLOCK at a time. A group is open while its lower
end is at most the row's threshold; its word holds the keys that may be near. Every turn computes one key of each row,
of the open group with the smallest lower end:

    lows  [QUERIES, BLOCK]   min, place of it          turns: as many as the row with the most keys left
    words [QUERIES, BLOCK]   lowest bit of that word   -> a key for each row
    value [QUERIES, 16]      terms i, i + 16, ...      -> float64, in the order of csrc/cpu/nearest_keys_exact.h

Products and sums are rounded one by one (the launch forbids fma), so values are those of the CPU to the bit.

A row whose queries the screen cannot hold has all its words full. Rows with few programs are cut into segments of
groups; what each segment finds is merged by (value, index), so nothing depends on the cut.
"""

from __future__ import annotations

import triton
import triton.language as tl

from memad_fast.kernels import prepare_keys as rows_of

GROUP = tl.constexpr(32)
"""Keys of a group: the bits of a word."""
NO_INDEX = tl.constexpr(2**63 - 1)
UNROLL = tl.constexpr(4)
"""Steps of 16 dimensions whose loads are under way at once."""
LARGEST = tl.constexpr(3.4028234663852886e38)

_SCREENED = rows_of.SCREENED
_ALL_KEYS = rows_of.ALL_KEYS
_NOT_FINITE = rows_of.NOT_FINITE


@triton.jit
def _total(parts, QUERIES: tl.constexpr):
    """Sum of 16 accumulators, halves onto halves."""
    parts = tl.reshape(parts, [QUERIES, 2, 2, 2, 2])
    for _ in tl.static_range(4):
        parts = tl.sum(parts, axis=1)
    return parts


@triton.jit
def _product(x, y, present, D: tl.constexpr, QUERIES: tl.constexpr, DIFFERENCE: tl.constexpr):
    """Sum of x y, or of (x - y)^2, of rows at these pointers."""
    lanes = tl.arange(0, 16)
    parts = tl.zeros([QUERIES, 16], tl.float64)
    for start in tl.range(0, D, 16, loop_unroll_factor=UNROLL):
        inside = present[:, None] & (start + lanes < D)[None, :]
        a = tl.load(x[:, None] + (start + lanes)[None, :], mask=inside, other=0.0).to(tl.float64)
        b = tl.load(y[:, None] + (start + lanes)[None, :], mask=inside, other=0.0).to(tl.float64)
        if DIFFERENCE:
            a = a - b
            b = a
        parts = parts + a * b
    return _total(parts, QUERIES)


@triton.jit
def _rank(query, query_square, key, present, METRIC: tl.constexpr, D: tl.constexpr, QUERIES: tl.constexpr):
    """What sorts, smallest first; not finite for a key that is not."""
    if METRIC == "l2":
        return _product(query, key, present, D, QUERIES, True)
    product = _product(query, key, present, D, QUERIES, False)
    if METRIC == "ip":
        return 0.0 - product  # never -0, which a sort might put before 0
    key_square = _product(key, key, present, D, QUERIES, False)
    squares = query_square * key_square
    is_zero = squares == 0.0
    value = 1.0 - tl.where(is_zero, 0.0, product / tl.sqrt(tl.where(is_zero, 1.0, squares)))
    value = tl.where(value < 0.0, 0.0, tl.where(value > 2.0, 2.0, value))
    return tl.where(key_square < float("inf"), value, float("inf"))


@triton.jit(
    do_not_specialize=["key_count", "first", "count", "splits", "padded_count", "segments", "segment_groups", "k"]
)
def compute_candidates(
    query,
    query_stride,
    keys,
    key_stride,
    key_count,
    filled,  # null, or where the number of keys to search is
    first,  # query of the chunk
    count,  # queries of the chunk
    states,
    shifts,
    thresholds,  # [splits, padded_count]; null where no query is screened
    splits,
    padded_count,
    ends,  # [padded_count, groups, 2]: lower end and word of each group
    groups,
    segments,
    segment_groups,
    k,
    values,  # [count, segments, k]
    indices,
    survivors,  # [count, segments]
    METRIC: tl.constexpr,
    EXACT_ERROR: tl.constexpr,
    D: tl.constexpr,
    ONE: tl.constexpr,  # k = 1
    QUERIES: tl.constexpr,
    BLOCK: tl.constexpr,
    BEST_BLOCK: tl.constexpr,
):
    """Finds the k best of the keys that are left, for each row and segment of groups, in any order."""
    blocks = tl.cdiv(count, QUERIES)
    segment = tl.program_id(0) // blocks
    row = (tl.program_id(0) % blocks).to(tl.int64) * QUERIES + tl.arange(0, QUERIES)
    inside = row < count
    searched = key_count.to(tl.int64)
    if filled is not None:
        searched = tl.minimum(tl.maximum(tl.load(filled), 0), searched)
    state = tl.load(states + row, mask=inside, other=_NOT_FINITE)
    is_screened = state == _SCREENED
    shift = tl.load(shifts + row, mask=inside, other=0.0).to(tl.float64)
    threshold = tl.where(state == _NOT_FINITE, float("-inf"), LARGEST)
    if thresholds is not None:
        for split in range(0, splits):
            own = tl.load(thresholds + split * padded_count + row, mask=is_screened, other=float("inf"))
            threshold = tl.minimum(threshold, own)
    row_of_query = query + (first + row) * query_stride
    searching = state != _NOT_FINITE
    query_square = tl.zeros([QUERIES], tl.float64)
    if METRIC == "cosine":
        query_square = _product(row_of_query, row_of_query, searching, D, QUERIES, False)

    best = tl.full([QUERIES], float("inf"), tl.float64)
    best_index = tl.full([QUERIES], NO_INDEX, tl.int64)
    found = tl.zeros([QUERIES], tl.int64)
    worst_slot = tl.zeros([QUERIES], tl.int64)
    computed = tl.zeros([QUERIES], tl.int64)
    place = (row * segments + segment) * k

    first_group = segment.to(tl.int64) * segment_groups
    last_group = tl.minimum(first_group + segment_groups, tl.cdiv(searched, GROUP))
    for start in range(first_group, last_group, BLOCK):
        group = start + tl.arange(0, BLOCK)
        exists = (group < last_group)[None, :] & searching[:, None]
        low = tl.full([QUERIES, BLOCK], float("-inf"), tl.float32)
        word = tl.full([QUERIES, BLOCK], -1, tl.int32)
        if thresholds is not None:
            held = exists & is_screened[:, None]
            pair = ends + 2 * (row[:, None] * groups + group[None, :])
            low = tl.load(pair.to(tl.pointer_type(tl.float32)), mask=held, other=float("-inf"))
            word = tl.load(pair + 1, mask=held, other=-1)
        low = tl.where(exists & (word != 0), low, float("inf"))
        nearest, pick = tl.min(low, axis=1, return_indices=True)
        present = nearest <= threshold
        while tl.max(present.to(tl.int32), axis=0) > 0:
            chosen = tl.arange(0, BLOCK)[None, :] == pick[:, None]
            open_keys = tl.sum(tl.where(chosen, word, 0), axis=1)
            bit = open_keys & -open_keys
            word = tl.where(chosen, word ^ bit[:, None], word)
            low = tl.where(word != 0, low, float("inf"))
            exponent = (bit.to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 255
            key = (start + pick).to(tl.int64) * GROUP + (exponent - 127)
            present = present & (key < searched)
            key = tl.where(present, key, 0)
            value = _rank(row_of_query, query_square, keys + key * key_stride, present, METRIC, D, QUERIES)
            computed += present.to(tl.int64)
            better = present & (value < float("inf")) & (value > float("-inf"))
            if ONE:
                better = better & ((value < best) | ((value == best) & (key < best_index)))
                best = tl.where(better, value, best)
                best_index = tl.where(better, key, best_index)
                if METRIC != "ip":
                    # An exact value is a tighter upper end; of ip its error is not known from the value.
                    score = value * (0.5 * (1.0 + 16.0 * EXACT_ERROR)) if METRIC == "l2" else value + 16.0 * EXACT_ERROR
                    high = rows_of.round_up(score + shift)
                    threshold = tl.where(better & is_screened, tl.minimum(threshold, high), threshold)
            else:
                is_full = found >= k
                worse = (value > best) | ((value == best) & (key > best_index))
                better = better & ~(is_full & worse)
                slot = place + tl.where(is_full, worst_slot, found)
                tl.store(values + slot, value, mask=better)
                tl.store(indices + slot, key, mask=better)
                found += (better & ~is_full).to(tl.int64)
                changed = better & (found >= k)
                if tl.max(changed.to(tl.int32), axis=0) > 0:
                    tl.debug_barrier()  # other threads wrote what is read now
                    worst, worst_index, slot = _worst(values, indices, place, k, changed, QUERIES, BEST_BLOCK)
                    best = tl.where(changed, worst, best)
                    best_index = tl.where(changed, worst_index, best_index)
                    worst_slot = tl.where(changed, slot, worst_slot)
                    tl.debug_barrier()
            nearest, pick = tl.min(low, axis=1, return_indices=True)
            present = nearest <= threshold
    if ONE:
        tl.store(values + place, best, mask=inside)
        tl.store(indices + place, best_index, mask=inside)
    else:
        for start in range(0, k, BEST_BLOCK):
            slot = start + tl.arange(0, BEST_BLOCK)[None, :]
            empty = inside[:, None] & (slot < k) & (slot >= found[:, None])
            tl.store(values + place[:, None] + slot, float("inf"), mask=empty)
            tl.store(indices + place[:, None] + slot, NO_INDEX, mask=empty)
    tl.store(survivors + row * segments + segment, computed, mask=inside)


@triton.jit
def _worst(values, indices, place, k, wanted, QUERIES: tl.constexpr, BEST_BLOCK: tl.constexpr):
    """The largest (value, index) of k slots, and its slot."""
    worst = tl.full([QUERIES], float("-inf"), tl.float64)
    worst_index = tl.full([QUERIES], -1, tl.int64)
    worst_slot = tl.zeros([QUERIES], tl.int64)
    for start in range(0, k, BEST_BLOCK):
        slot = start + tl.arange(0, BEST_BLOCK)[None, :].to(tl.int64)
        inside = wanted[:, None] & (slot < k)
        value = tl.load(values + place[:, None] + slot, mask=inside, other=float("-inf"))
        index = tl.load(indices + place[:, None] + slot, mask=inside, other=-1)
        most = tl.max(value, axis=1)
        most_index = tl.max(tl.where(value == most[:, None], index, -1), axis=1)
        here = tl.max(tl.where((value == most[:, None]) & (index == most_index[:, None]), slot, 0), axis=1)
        worse = (most > worst) | ((most == worst) & (most_index > worst_index))
        worst = tl.where(worse, most, worst)
        worst_index = tl.where(worse, most_index, worst_index)
        worst_slot = tl.where(worse, here, worst_slot)
    return worst, worst_index, worst_slot


@triton.jit(do_not_specialize=["key_count", "count", "segments", "k", "width"])
def write_results(
    values,  # [count, WIDTH]: what the segments found, in any order; k > 1: sorted
    indices,
    survivors,
    states,
    key_count,
    filled,
    count,
    segments,
    k,
    width,
    distances,  # [count, k]
    found,
    computed,
    full_path,
    METRIC: tl.constexpr,
    ONE: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Merges what the segments found, and writes it as the op returns it."""
    row = tl.program_id(0).to(tl.int64) * QUERIES + tl.arange(0, QUERIES)
    inside = row < count
    if ONE:
        best = tl.full([QUERIES], float("inf"), tl.float64)
        best_index = tl.full([QUERIES], NO_INDEX, tl.int64)
        for segment in range(0, segments):
            value = tl.load(values + row * width + segment, mask=inside, other=float("inf"))
            index = tl.load(indices + row * width + segment, mask=inside, other=NO_INDEX)
            better = (value < best) | ((value == best) & (index < best_index))
            best = tl.where(better, value, best)
            best_index = tl.where(better, index, best_index)
        _write(best, best_index, distances + row, found + row, inside, METRIC)
    else:
        for start in range(0, k, BLOCK):
            slot = start + tl.arange(0, BLOCK)[None, :]
            exists = inside[:, None] & (slot < k)
            value = tl.load(values + row[:, None] * width + slot, mask=exists, other=0.0)
            index = tl.load(indices + row[:, None] * width + slot, mask=exists, other=0)
            at = row[:, None] * k + slot
            _write(value, index, distances + at, found + at, exists, METRIC)
    total = tl.zeros([QUERIES], tl.int64)
    for segment in range(0, segments):
        total += tl.load(survivors + row * segments + segment, mask=inside, other=0)
    searched = key_count.to(tl.int64)
    if filled is not None:
        searched = tl.minimum(tl.maximum(tl.load(filled), 0), searched)
    state = tl.load(states + row, mask=inside, other=_NOT_FINITE)
    tl.store(computed + row, total, mask=inside)
    tl.store(full_path + row, (state == _ALL_KEYS) | (total > 32 + 4 * k + searched // 16), mask=inside)


@triton.jit
def _write(value, index, distances, found, inside, METRIC: tl.constexpr):
    exists = index != NO_INDEX
    if METRIC == "ip":
        value = 0.0 - value
    tl.store(distances, tl.where(exists, value.to(tl.float32), float("nan")), mask=inside)
    tl.store(found, tl.where(exists, index, -1), mask=inside)
