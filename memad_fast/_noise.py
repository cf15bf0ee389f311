"""Counter-based Gumbel noise in plain torch, bit for bit what every compiled backend draws.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011) turns a 64-bit key
and a 128-bit counter into four 32-bit words. Here

    key     = (seed low, seed high)
    counter = (block low, block high, row low, row high)
    block   = 16·(column div 64) + column mod 16,   word of the block = (column div 16) mod 4

so 16 neighbouring blocks serve 64 neighbouring columns, word by word, and a vector of 4, 8 or 16 blocks yields vectors
of neighbouring columns. The noise is a function of (seed, row, column) alone.

A word becomes g = −log(−log v) with v = (word div 256 | 1)·2⁻²⁴. v = 1 − u for a uniform u, both exact in float32, so
log v is log1p(−u) with nothing lost in either tail. Both logarithms are the sequence of float32 operations in ``log``,
each rounded on its own (no fused multiply-add): that sequence, not a mathematical function, defines the noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)  # the golden ratio and sqrt(3) − 1, as Weyl sequences
ROUNDS = 10
GROUP = 64  # columns that share 16 blocks
BLOCKS = 16

# log(1 + f) = f − f²/2 + f³·P(f) on [√½ − 1, √2 − 1]; P by weighted least squares, 0.1 ulp of the result.
POLYNOMIAL = tuple(
    float.fromhex(text)
    for text in (
        "0x1.555554p-2",
        "-0x1.000226p-2",
        "0x1.99a008p-3",
        "-0x1.547244p-3",
        "0x1.22da1cp-3",
        "-0x1.0d8542p-3",
        "0x1.055b6ep-3",
        "-0x1.38b584p-4",
    )
)
LN2_HIGH = float.fromhex("0x1.63p-1")  # 8 bits: its product with an exponent is exact
LN2_LOW = float.fromhex("-0x1.bd0106p-13")
ONE_BITS = 0x3F800000
SQRT_HALF_BITS = 0x3F3504F3


def _product_words(multiplier: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of multiplier·word, words held in int64 without ever overflowing it."""
    low_part = word * (multiplier & 0xFFFF)
    high_part = word * (multiplier >> 16)
    high = (high_part + (low_part >> 16)) >> 16
    low = (((high_part & 0xFFFF) << 16) + low_part) & _WORD
    return high, low


def philox4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four counter words and two key words to four random words, all int64 in [0, 2³²)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _product_words(MULTIPLIERS[0], c0)
        high1, low1 = _product_words(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + KEY_STEPS[0]) & _WORD, (k1 + KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def log(x: Tensor) -> Tensor:
    """Natural logarithm of positive normal float32 values, within 1 ulp, by a fixed sequence of rounded operations."""
    bits = x.view(torch.int32) + (ONE_BITS - SQRT_HALF_BITS)
    exponent = ((bits >> 23) - 127).to(torch.float32)
    f = ((bits & 0x007FFFFF) + SQRT_HALF_BITS).view(torch.float32) - 1.0
    square = f * f
    p0, p1, p2, p3, p4, p5, p6, p7 = POLYNOMIAL
    fourth = square * square
    low = (p0 + p1 * f) + square * (p2 + p3 * f)
    high = (p4 + p5 * f) + square * (p6 + p7 * f)
    p = low + fourth * high
    tail = (square * f) * p
    tail = tail + exponent * LN2_LOW
    tail = tail - square * 0.5
    return (f + tail) + exponent * LN2_HIGH


def gumbel_from_words(words: Tensor) -> Tensor:
    """Standard Gumbel noise, float32 in [−2.812, 16.636], from random words (int64 in [0, 2³²))."""
    v = ((words >> 8) | 1).to(torch.float32) * 2.0**-24
    return -log(-log(v))


def gumbel_noise(seed: Tensor, rows: int, columns: int) -> Tensor:
    """``[rows, columns]`` float32 standard Gumbel noise for a 0-dimensional int64 seed, on the seed's device."""
    row = torch.arange(rows, device=seed.device)[:, None]
    groups = -(-columns // GROUP)
    block = torch.arange(groups * BLOCKS, device=seed.device)[None, :]
    words = philox4x32(
        (
            (block & _WORD).expand(rows, -1),
            (block >> 32).expand(rows, -1),
            (row & _WORD).expand(-1, groups * BLOCKS),
            (row >> 32).expand(-1, groups * BLOCKS),
        ),
        (seed & _WORD, (seed >> 32) & _WORD),
    )
    by_column = torch.stack([word.reshape(rows, groups, BLOCKS) for word in words], dim=2)
    return gumbel_from_words(by_column.reshape(rows, groups * GROUP)[:, :columns])
