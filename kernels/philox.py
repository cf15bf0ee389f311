"""The Gumbel noise of ``memad_fast._noise`` inside Triton kernels, bit for bit.

    key     = (seed low, seed high)
    counter = (block, 0, row low, row high)
    block   = 16·(column div 64) + column mod 16,   word of the block = (column div 16) mod 4

(There are fewer than 2³¹ columns here, so the block's high word is 0.) Integers wrap alike everywhere. What must not
differ is the rounding: each product and sum of ``_log`` is rounded on its own, so kernels that call it are launched
with ``enable_fp_fusion=False``; ``tl.dot`` keeps its fused multiply-adds. No value on the way is denormal, infinite or
NaN.

Operations per column of a tile: 34 of four columns for their words (a round takes two products 32 × 32 → 64 and two
three-way xors; of the first two rounds only two xors depend on both row and column), 5 to test a word (``may_reach``),
45 for the two logarithms.
"""

from __future__ import annotations

import triton
import triton.language as tl

from memad_fast import _noise

_M0, _M1 = (tl.constexpr(multiplier) for multiplier in _noise.MULTIPLIERS)
_STEP0, _STEP1 = (tl.constexpr(step) for step in _noise.KEY_STEPS)
_ROUNDS = tl.constexpr(_noise.ROUNDS)
_GROUP, _BLOCKS = tl.constexpr(_noise.GROUP), tl.constexpr(_noise.BLOCKS)

_P0, _P1, _P2, _P3, _P4, _P5, _P6, _P7 = (tl.constexpr(coefficient) for coefficient in _noise.POLYNOMIAL)
_LN2_HIGH, _LN2_LOW = tl.constexpr(_noise.LN2_HIGH), tl.constexpr(_noise.LN2_LOW)
_SQRT_HALF_BITS = tl.constexpr(_noise.SQRT_HALF_BITS)
_TO_SQRT_HALF = tl.constexpr(_noise.ONE_BITS - _noise.SQRT_HALF_BITS)

# ``floor``: 23·ln 2, the noise of the word 2⁹, and what roundings amount to below 2¹⁰; a share of the limit above it.
_REACH = tl.constexpr(15.942385 + 1e-4)
_REACH_SHARE = tl.constexpr(2.0**-22)
_LOG2_E = tl.constexpr(1.4426950408889634)
_TWO_TO_23 = tl.constexpr(0x4B000000)  # as a float: 2²³ + n for n < 2²³ in its low bits


@triton.jit
def _low(x):
    return x.to(tl.uint32)


@triton.jit
def _high(x):
    return (x >> 32).to(tl.uint32)


@triton.jit
def _philox(seed, block, row, row_high):
    """Philox4x32-10 of (block, 0, row, row_high). Shapes broadcast no earlier than the rounds need them to."""
    k0, k1 = _low(seed), _high(seed)
    c0, c1, c2, c3 = block, 0, row, row_high
    for _ in tl.static_range(_ROUNDS):
        p0 = c0.to(tl.uint64) * _M0
        p1 = c2.to(tl.uint64) * _M1
        c0 = _high(p1) ^ c1 ^ k0
        c1 = _low(p1)
        c2 = _high(p0) ^ c3 ^ k1
        c3 = _low(p0)
        k0 = _low(k0.to(tl.uint64) + _STEP0)
        k1 = _low(k1.to(tl.uint64) + _STEP1)
    return c0, c1, c2, c3


@triton.jit
def _rows_of(first_row, ROWS: tl.constexpr):
    """Low words [ROWS, 1] and the high word of aligned rows, which share it."""
    first = first_row.to(tl.uint64)
    return (_low(first) + tl.arange(0, ROWS).to(tl.uint32))[:, None], _high(first)


@triton.jit
def tile_columns(first_column, COLUMNS: tl.constexpr):
    """The columns [COLUMNS] of a tile in the order in which ``tile_words`` gives their words: block by block."""
    at = tl.arange(0, COLUMNS)
    return first_column + at // _GROUP * _GROUP + at % 4 * _BLOCKS + at % _GROUP // 4


@triton.jit
def tile_words(seed, first_row, first_column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Random words [ROWS, COLUMNS]: first_row is a multiple of ROWS, first_column and COLUMNS are of 64.

    A block's four words stay neighbours, so that one thread draws and uses them: hence the order of the columns.
    """
    row, row_high = _rows_of(first_row, ROWS)
    block = first_column // 4 + tl.arange(0, COLUMNS // 4)
    w0, w1, w2, w3 = _philox(seed.to(tl.uint64), block.to(tl.uint32)[None, :], row, row_high)
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [ROWS, COLUMNS])


@triton.jit
def column_words(seed, first_row, columns, ROWS: tl.constexpr):
    """Random words of ``columns`` [ROWS, any], column by column."""
    row, row_high = _rows_of(first_row, ROWS)
    block = columns // _GROUP * _BLOCKS + columns % _BLOCKS
    w0, w1, w2, w3 = _philox(seed.to(tl.uint64), block.to(tl.uint32), row, row_high)
    word = columns // _BLOCKS % 4
    return tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))


@triton.jit
def _log(x):
    bits = x.to(tl.int32, bitcast=True) + _TO_SQRT_HALF
    exponent = ((bits >> 23) - 127).to(tl.float32)
    f = ((bits & 0x007FFFFF) + _SQRT_HALF_BITS).to(tl.float32, bitcast=True) - 1.0
    square = f * f
    fourth = square * square
    low = (_P0 + _P1 * f) + square * (_P2 + _P3 * f)
    high = (_P4 + _P5 * f) + square * (_P6 + _P7 * f)
    p = low + fourth * high
    tail = (square * f) * p
    tail = tail + exponent * _LN2_LOW
    tail = tail - square * 0.5
    return (f + tail) + exponent * _LN2_HIGH


@triton.jit
def gumbel(words):
    """Standard Gumbel noise, −log(−log v) with v = (word div 256 | 1)·2⁻²⁴."""
    v = ((words >> 8) | 1).to(tl.int32).to(tl.float32) * (2.0**-24)
    return _log(_log(v) * -1.0) * -1.0


@triton.jit
def floor(limit):
    """What ``may_reach`` compares with, for a limit on the scores."""
    return limit - (tl.abs(limit) * _REACH_SHARE + _REACH)


@triton.jit
def may_reach(scores, words, floor):
    """False only where score + noise, rounded to float32, is below the limit that ``floor`` was made of.

    With u = 1 − v the noise is −log(−log(1 − u)) ≤ −log u, so a noise of at least x = limit − score needs u ≤ exp(−x).
    u = (2n + 1)·2⁻²⁴ with n the complement of the word's high 23 bits: n ≤ 2²³·exp(score − limit). One exponential of
    the unit for it instead of two logarithms; close where it matters: of scores that would have to be lucky in the
    proportion p, it lets through p·(1 + p / 2).
    """
    n = ((words >> 9) ^ 0x007FFFFF | _TWO_TO_23).to(tl.float32, bitcast=True) - 8388608.0
    return n <= tl.exp2((scores - floor) * _LOG2_E)
