"""Searches whose best keys a screen can only just tell apart, for the tests of nearest_keys on every device.

A screen computes each score with an error of at most some bound. A duel is a query q and a key a whose score has that
whole error, against the key 0, whose score has none: 0 is the mean of the bank, as the bank holds the mirror image of
every key. In integer arithmetic the two scores differ by a few units, so a bound that is a few percent too small, at
the lower end or at the upper, drops the better of the two. The scores are those of centred rows, as in the notes
beside the kernel: |a|^2/2 - q.a for l2, -q.a for ip and cosine.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st
from searches import FORMATS, METRICS, Format, Random, Rows
from torch import Tensor


@dataclass(frozen=True)
class Duel:
    """What makes one; ``levels`` are those of the integer codes of queries and keys."""

    metric: str
    levels: tuple[int, int] = (127, 127)
    power: int = 7  # a step of the query's code is 2^power units
    past_half: int = -1  # units from the middle of two steps: below it a value loses half a step, above it gains it
    margin: int = 2  # how many steps the values lie below the largest
    pairs: int = 120  # of dimensions
    gap: int = -4  # between the two scores, about, in units^2
    near: int = 2  # keys that q prefers to both
    far: int = 20  # other keys
    crowd: int = 0  # neighbours of a, hardly worse
    zeros: int = 1  # the other duellist, so many times
    count: int = 7  # queries
    offset: int = 0
    extra: int = 0  # k beyond what lets in one of the two
    form: Format = FORMATS[0]
    seed: int = 0


def half_steps(duel: Duel) -> tuple[Rows, Rows]:
    """(q, a) of which quantisation leaves half a step everywhere, the residual of each parallel to the other row.

    l2: all values are the same, and a is about 2q, where its score is 0. Else: one half of the dimensions has a product
    and the other takes it back.
    """
    query_levels, key_levels = duel.levels
    doubled = duel.metric == "l2"
    key_power = max(0, duel.power + round(np.log2(2 * query_levels / key_levels))) if doubled else duel.power
    largest_q, largest_a = query_levels << duel.power, key_levels << key_power

    def beside(digit: int, power: int, past_half: int) -> int:
        return (digit << power) + (1 << power >> 1) + past_half

    digit = max(query_levels - duel.margin, 0)
    key_digit = max(key_levels - duel.margin, 0)
    if doubled:
        key_digit = min(2 * beside(digit, duel.power, 0) >> key_power, key_levels - 1)
    q_low, q_high = (beside(digit, duel.power, sign * duel.past_half) for sign in (1, -1))
    a_low, a_high = (beside(key_digit, key_power, sign * duel.past_half) for sign in (1, -1))
    # The last two dimensions hold the largest values, which set the steps of the codes.
    if doubled:
        q = [q_low] * 2 * duel.pairs + [min(largest_a // 2, largest_q), largest_q]
        a = [a_low] * 2 * duel.pairs + [largest_a, min(2 * largest_q, largest_a)]
    else:
        q = [q_low] * duel.pairs + [q_high] * duel.pairs + [0, largest_q]
        a = [a_low] * duel.pairs + [-a_high] * duel.pairs + [largest_a, 0]
    return np.array(q, float), np.array(a, float)


def lost_terms(duel: Duel) -> tuple[Rows, Rows]:
    """(q, 2q) of which a float32 sum of products, in order, rounds every term after the first in the same direction.

    The first product is 2^25, where float32 counts in fours. The others are two (lost), or a little more (doubled).
    """
    q = np.full(2 * duel.pairs, 64.0 + max(duel.past_half, 0))
    q[0] = 64.0 * 4096
    return q, 2 * q


def balanced(duel: Duel, q: Rows, a: Rows) -> tuple[Rows, Rows]:
    """Dimensions appended until q's scores of a and of 0 differ by about the gap."""
    largest = min(np.abs(q).max(), np.abs(a).max())
    for _ in range(8):
        if duel.metric == "l2":
            excess = a @ a - 2 * q @ a - duel.gap
            size = min(np.floor(np.sqrt(abs(excess))), largest)
            q, a = np.append(q, size if excess > 0 else 0.0), np.append(a, size)  # adds size^2 - 2 size^2, or size^2
        else:
            excess = -q @ a - duel.gap
            size = min(np.floor(np.sqrt(abs(excess))), largest)
            q, a = np.append(q, size), np.append(a, size if excess > 0 else -size)
    return q, a


def bank_around_nothing(duel: Duel, random: Random, q: Rows, a: Rows) -> Rows:
    """0, a and other keys, and the mirror image of each."""
    dim = len(q)
    better = q + np.round(0.1 * np.sqrt(np.square(q).mean()) * random.uniform(-1, 1, (duel.near, dim)))
    others = np.round(np.abs(a).max() * random.uniform(-1, 1, (duel.far, dim)))
    worse = np.sign(a) if duel.metric == "l2" else -np.sign(q)
    crowd = a + worse * (random.random((duel.crowd, dim)) < 4 / dim)
    half = np.concatenate([a[None], better, others, crowd])
    return random.permutation(np.concatenate([half, -half, np.zeros((duel.zeros, dim))]))


def search_of(duel: Duel, q: Rows, a: Rows) -> tuple[Tensor, Tensor, int]:
    """(query, keys, k), on a lattice of unit 1."""
    random = np.random.default_rng(duel.seed)
    q, a = balanced(duel, q, a)
    keys = bank_around_nothing(duel, random, q, a)
    keys = keys * (signs := random.choice([-1, 1], len(q)))
    q = q * signs
    scores = np.square(keys).sum(1) - 2 * keys @ q if duel.metric == "l2" else -keys @ q
    k = min(int((scores < min(0.0, scores[(keys == a * signs).all(1)].min())).sum()) + 1 + duel.extra, len(keys))
    query = q * random.choice([-1, 1], (duel.count, 1))  # the bank is its own mirror image
    if duel.metric != "cosine":
        keys = keys + duel.offset
    if duel.metric == "l2":
        query = query + duel.offset
    form = duel.form.dtype
    return torch.from_numpy(query).to(form), torch.from_numpy(keys).to(form), k


@st.composite
def duels(draw: st.DrawFn, pairs: tuple[int, ...] = (*range(1, 41), *range(100, 251))) -> Duel:
    levels = st.sampled_from([127, 127, 127, 128, 64, 63, 31, 15, 7])
    form, power = draw(st.sampled_from([(FORMATS[0], 7), (FORMATS[0], 4), (FORMATS[1], 1), (FORMATS[2], 3)]))
    half = 1 << power >> 1
    return Duel(
        metric=draw(st.sampled_from(METRICS)),
        levels=(draw(levels), draw(levels)),
        power=power,
        past_half=draw(st.one_of(st.sampled_from([-1, 1]), st.integers(-half, half - 1))),
        margin=draw(st.sampled_from([1, 2, 3, 20, 60])),
        pairs=draw(st.sampled_from(pairs)),
        gap=draw(st.integers(-20, 20)),
        near=draw(st.integers(0, 4)),
        far=draw(st.integers(0, 60)),
        crowd=draw(st.one_of(st.just(0), st.integers(0, 60))),
        zeros=draw(st.sampled_from([1, 1, 2, 65])),
        count=draw(st.one_of(st.integers(1, 8), st.just(40))),
        offset=draw(st.sampled_from([0, 0, 1000, -12345, 2**19])) if power > 4 else 0,
        extra=draw(st.sampled_from([0, 0, 0, 1])),
        form=form,
        seed=draw(st.integers(0, 2**32 - 1)),
    )


def rows_on_the_grid(metric: str, seed: int) -> tuple[Tensor, Tensor, int]:
    """(40 queries, keys, k) whose codes are the rows but for a factor: no residual hides what float32 does to products.

    Of many random keys those next to each other in order are kept, a few units of float32 apart, and k ends between the
    two closest. The bank is its own mirror image, around 0.
    """
    random = np.random.default_rng(seed)
    dim, kept = 9, 120
    pool = random.integers(-127, 128, (300_000, dim)).astype(np.float64)
    pool[np.arange(len(pool)), random.integers(dim, size=len(pool))] = 127
    pool *= random.choice([4093, 4095, 4097, 4099], (len(pool), 1))
    query = 4097.0 * random.integers(100, 128, dim)
    query[0] = 4097 * 127
    scores = np.square(pool).sum(1) - 2 * pool @ query if metric == "l2" else -pool @ query
    if metric == "cosine":
        scores /= np.linalg.norm(pool, axis=1)
    order = scores.argsort()
    window = order[(first := 10 if metric == "l2" else 1000) : first + kept]
    k = 1 + int(np.diff(scores[window])[: kept // 2].argmin())
    keys = random.permutation(np.concatenate([pool[window], -pool[window]]))
    rows = query * random.choice([-1, 1], (40, 1))
    return torch.from_numpy(rows).float(), torch.from_numpy(keys).float(), k
