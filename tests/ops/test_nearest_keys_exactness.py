"""An attack on the exactness of nearest_keys: inputs made to slip through its screen, and truths that allow nothing.

Three kinds of truth:
- integer arithmetic, where the rows lie on a lattice (integers times a power of two): no tolerance, true ties;
- float64 with its own rounding as the only tolerance, for all other rows (tests/exactness.py);
- the search for all M keys, which has nothing to screen away: any other k is a prefix of it, to the bit.

And every result is the same bits for every instruction set, number of threads, batch split, memory layout and for keys
prepared, overwritten or neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from exactness import assert_exact_search, order_on_a_lattice
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

import memad_fast

native = pytest.importorskip("memad_fast.native", exc_type=ImportError)

Rows = NDArray[np.float64]  # [n, D], holding values of the dtype under test
Random = np.random.Generator
Result = tuple[Tensor, Tensor]

METRICS = ["l2", "cosine", "ip"]


@dataclass(frozen=True)
class Format:
    """A dtype as a lattice: integers of at most 2^bits times a unit of 2^lowest to 2^highest."""

    dtype: torch.dtype
    bits: int
    lowest: int
    highest: int


FORMATS = [
    Format(torch.float32, 24, -149, 103),
    Format(torch.bfloat16, 8, -133, 119),
    Format(torch.float16, 11, -24, 4),
]


# --- every way to search ----------------------------------------------------------------------------------------


@contextmanager
def machine(level: str, threads: int = 1) -> Iterator[None]:
    before = native.isa(), torch.get_num_threads()
    native.set_isa(level)
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        native.set_isa(before[0])
        torch.set_num_threads(before[1])


def assert_same_bits(got: Result, expected: Result, way: str) -> None:
    assert torch.equal(got[1], expected[1]), f"other indices {way}"
    assert torch.equal(got[0].view(torch.int32), expected[0].view(torch.int32)), f"other distances {way}"


def spread(rows: Tensor) -> Tensor:
    """The same rows with other numbers between and beside them."""
    wide = torch.full((2 * rows.shape[0], rows.shape[1] + 5), 3.0, dtype=rows.dtype)
    view = wide[::2, 2:-3]
    view.copy_(rows)
    return view


def prepared_from_far_rows(keys: Tensor, metric: str) -> memad_fast.PreparedKeys:
    """Keys written over rows that lie elsewhere, so that the centre is theirs and not the keys'."""
    far = torch.full_like(keys, 1e4)
    far[1::2] = -7.0
    half = len(keys) // 2
    prepared = memad_fast.prepare_keys(far, metric=metric).overwrite_(half, keys[half:])
    return prepared.overwrite_(torch.arange(half), keys[:half])


def search_every_way(query: Tensor, keys: Tensor, k: int, metric: str, split: int) -> Result:
    """The one result of all ways to search; fails where there are two."""

    def search(queries: Tensor, searched: Tensor | memad_fast.PreparedKeys, best: int = k) -> Result:
        return memad_fast.nearest_keys(queries, searched, best, metric=metric)

    levels = native.isas()
    with machine(levels[0]):
        expected = search(query, keys)
        packed_low = memad_fast.prepare_keys(keys, metric=metric)
    for level in levels:
        with machine(level):
            prepared = memad_fast.prepare_keys(keys, metric=metric)
            assert_same_bits(search(query, keys), expected, f"on {level}")
            assert_same_bits(search(query, prepared), expected, f"on {level}, prepared")
            assert_same_bits(search(query, packed_low), expected, f"on {level}, prepared on {levels[0]}")
            assert_same_bits(
                search(query, prepared_from_far_rows(keys, metric)), expected, f"on {level}, around an old centre"
            )
            everything = search(query, keys, len(keys))
            assert_same_bits((everything[0][:, :k], everything[1][:, :k]), expected, f"on {level}, of all keys")
            parts = [search(part, prepared) for part in query.split(split)]
            whole = (torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts]))
            assert_same_bits(whole, expected, f"on {level}, {split} queries at a time")
    for threads in (2, 3):
        with machine(levels[-1], threads):
            assert_same_bits(search(query, keys), expected, f"on {threads} threads")
            assert_same_bits(search(query, prepared), expected, f"on {threads} threads, prepared")
    with machine(levels[-1]):
        assert_same_bits(search(spread(query), spread(keys)), expected, "in wider rows")
    return expected


# --- generators -------------------------------------------------------------------------------------------------


def clusters(random: Random, rows: int, dim: int) -> Rows:
    centres = 10 * random.standard_normal((1 + rows // 20, dim))
    return centres[random.integers(0, len(centres), rows)] + 0.01 * random.standard_normal((rows, dim))


BASES = {
    "gaussian": lambda random, rows, dim: random.standard_normal((rows, dim)),
    "uniform": lambda random, rows, dim: random.uniform(-1, 1, (rows, dim)),
    "heavy tails": lambda random, rows, dim: random.standard_cauchy((rows, dim)),
    "sparse": lambda random, rows, dim: np.maximum(random.standard_normal((rows, dim)) - 1.0, 0.0),
    "few values": lambda random, rows, dim: random.integers(-2, 3, (rows, dim)).astype(np.float64),
    "signs": lambda random, rows, dim: random.choice([-1.0, 1.0], (rows, dim)),  # all at the end of a code's range
    "clusters": clusters,
    "equal rows": lambda random, rows, dim: np.tile(random.standard_normal(dim), (rows, 1)),
    "low rank": lambda random, rows, dim: random.standard_normal((rows, 2)) @ random.standard_normal((2, dim)),
}


def dominant_dimension(random: Random, rows: Rows) -> Rows:
    return rows * np.where(np.arange(rows.shape[1]) == random.integers(rows.shape[1]), 1e5, 1.0)


CHANGES = {
    "nothing": lambda random, rows: rows,
    "offset 1e4": lambda random, rows: rows + 1e4,
    "offset 1e6": lambda random, rows: rows + 1e6 * random.choice([-1, 1], rows.shape[1]),
    "dimensions of any scale": lambda random, rows: rows * 10.0 ** random.uniform(-6, 6, rows.shape[1]),
    "dominant dimension": dominant_dimension,
    "rows of any scale": lambda random, rows: rows * 10.0 ** random.integers(-3, 4, (len(rows), 1)),
}
RANGE_CHANGES = {
    "rows of every scale": lambda random, rows: rows * 10.0 ** random.integers(-30, 30, (len(rows), 1)),
    "denormals": lambda random, rows: rows * 2.0**-135,
    "squares underflow": lambda random, rows: rows * 2.0 ** -random.uniform(55, 80),
    "squares overflow": lambda random, rows: rows * 2.0 ** random.uniform(56, 70),
    "the largest": lambda random, rows: rows * (3.4e38 / max(np.abs(rows).max(), 1e-9)),
    "some rows the largest": lambda random, rows: np.where(random.random((len(rows), 1)) < 0.1, rows * 1e37, rows),
}


class Planter:
    """Puts keys where they are hard to tell apart. ``step(rows)`` is the smallest change of each value."""

    def __init__(self, random: Random, query: Rows, keys: Rows, step: Callable[[Rows], Rows]) -> None:
        self.random, self.query, self.keys, self.step = random, query, keys, step
        count = int(random.integers(1, len(keys) + 1))
        self.places = random.permutation(len(keys))[:count]
        self.around = query[random.integers(len(query), size=count)]
        self.sources = keys[random.integers(len(keys), size=count)]

    def nudged(self, rows: Rows) -> Rows:
        """By up to three steps in one dimension."""
        one = np.arange(rows.shape[1]) == self.random.integers(rows.shape[1], size=(len(rows), 1))
        return rows + one * self.random.integers(-3, 4, (len(rows), 1)) * self.step(rows)

    def duplicates(self) -> None:
        self.keys[self.places] = self.sources

    def queries(self) -> None:
        self.keys[self.places] = self.around

    def near_duplicates(self) -> None:
        self.keys[self.places] = self.nudged(np.tile(self.sources[0], (len(self.places), 1)))

    def near_queries(self) -> None:
        self.keys[self.places] = self.nudged(self.around)

    def mirrored(self) -> None:
        """On the other side of a query, as far."""
        self.keys[self.places] = 2 * self.around - self.sources

    def permuted(self) -> None:
        """Around one query, with the same differences in other places, and of other signs."""
        difference = self.random.permuted(np.tile(self.sources[0] - self.around[0], (len(self.places), 1)), axis=1)
        self.keys[self.places] = self.around[0] + difference * self.random.choice([-1, 1], difference.shape)

    def parallel(self) -> None:
        """Multiples of a query: the cosines are one number."""
        self.keys[self.places] = self.around * 2.0 ** self.random.integers(0, 3, (len(self.places), 1))

    def negated(self) -> None:
        """A bank that sums to zero."""
        half = len(self.keys) // 2
        self.keys[half : 2 * half] = -self.keys[:half]

    def queries_in_the_middle(self) -> None:
        self.query[: 1 + len(self.query) // 2] = self.keys.mean(axis=0)


PLANTS = [name for name in vars(Planter) if not name.startswith("_") and name != "nudged"]


@dataclass(frozen=True)
class Recipe:
    """All that makes a search; what hypothesis prints where one fails."""

    seed: int
    count: int
    rows: int
    dim: int
    k: int
    split: int
    metric: str
    format: Format
    base: str
    change: str
    plants: tuple[str, ...]

    def random(self) -> Random:
        return np.random.default_rng(self.seed)

    def fresh(self, random: Random) -> tuple[Rows, Rows]:
        rows = BASES[self.base](random, self.count + self.rows, self.dim)
        rows = (CHANGES | RANGE_CHANGES)[self.change](random, rows)
        return rows[: self.count].copy(), rows[self.count :].copy()


@st.composite
def recipes(draw: st.DrawFn, changes: dict) -> Recipe:
    dim = draw(st.one_of(st.integers(1, 20), st.sampled_from([31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 256, 300])))
    rows = draw(st.one_of(st.integers(1, 20), st.integers(1, 300)))
    count = draw(st.one_of(st.integers(1, 8), st.integers(1, 400)))
    count = max(1, min(count, 2**19 // (rows * dim)))
    return Recipe(
        seed=draw(st.integers(0, 2**32 - 1)),
        count=count,
        rows=rows,
        dim=dim,
        k=min(rows, draw(st.one_of(st.just(1), st.integers(1, 10), st.just(rows)))),
        split=draw(st.integers(max(1, count // 3), count)),
        metric=draw(st.sampled_from(METRICS)),
        format=draw(st.sampled_from(FORMATS)),
        base=draw(st.sampled_from(sorted(BASES))),
        change=draw(st.sampled_from(sorted(changes))),
        plants=tuple(draw(st.lists(st.sampled_from(PLANTS), max_size=3))),
    )


# --- the properties ---------------------------------------------------------------------------------------------


def largest_on_a_lattice(form: Format, dim: int) -> int:
    """The integers up to which the dtype holds the rows, and float64 the sums over them, exactly."""
    return min(2**form.bits, int((2**51 / dim) ** 0.5))


def on_a_lattice(recipe: Recipe) -> tuple[Rows, Rows]:
    random = recipe.random()
    query, keys = recipe.fresh(random)
    largest = largest_on_a_lattice(recipe.format, recipe.dim)
    scale = random.uniform(0, 1) * largest / max(np.abs(query).max(), np.abs(keys).max(), 1e-9)
    query, keys = np.round(query * scale), np.round(keys * scale)
    for plant in recipe.plants:
        getattr(Planter(random, query, keys, np.ones_like), plant)()
    return np.clip(np.round(query), -largest, largest), np.clip(np.round(keys), -largest, largest)


def assert_exact_on_a_lattice(query: Tensor, keys: Tensor, unit: float, k: int, metric: str, split: int) -> None:
    distances, indices = search_every_way(query, keys, k, metric, split)
    if metric == "cosine":  # its quotients are rounded
        return assert_exact_search(query, keys, distances, indices, metric)
    expected = order_on_a_lattice(query, keys, unit, k, metric)
    assert torch.equal(indices, expected[1]), "not the order of integer arithmetic"
    assert torch.equal(distances, expected[0]), "a distance is not the integer, rounded once"
    return None


@settings(max_examples=200, deadline=None)
@given(recipe=recipes(CHANGES), magnitude=st.one_of(st.integers(-149, 127), st.integers(-80, -55), st.integers(56, 70)))
def test_on_a_lattice_the_result_is_that_of_integer_arithmetic(recipe: Recipe, magnitude: int) -> None:
    """At any magnitude, and more often at those whose squares leave the range of float32."""
    form = recipe.format
    rows = on_a_lattice(recipe)
    bits = int(np.log2(max(1.0, np.abs(rows[0]).max(), np.abs(rows[1]).max())))
    unit = 2.0 ** min(max(magnitude - bits, form.lowest), form.highest)
    query, keys = (torch.from_numpy(part * unit).to(form.dtype) for part in rows)
    assert_exact_on_a_lattice(query, keys, unit, recipe.k, recipe.metric, recipe.split)


def in_floats(recipe: Recipe) -> tuple[Tensor, Tensor]:
    random, dtype = recipe.random(), recipe.format.dtype
    largest = torch.finfo(dtype).max

    def rounded(rows: Rows) -> Tensor:
        return torch.from_numpy(np.clip(rows, -largest, largest)).to(dtype)

    def step(rows: Rows) -> Rows:
        return np.maximum(np.abs(rows) * 2.0**-recipe.format.bits, 2.0**recipe.format.lowest)

    query, keys = (rounded(rows).double().numpy() for rows in recipe.fresh(random))
    for plant in recipe.plants:
        getattr(Planter(random, query, keys, step), plant)()
    return rounded(query), rounded(keys)


@settings(max_examples=200, deadline=None)
@given(recipe=recipes(CHANGES | RANGE_CHANGES))
def test_whatever_the_rows_the_result_is_that_of_float64(recipe: Recipe) -> None:
    query, keys = in_floats(recipe)
    distances, indices = search_every_way(query, keys, recipe.k, recipe.metric, recipe.split)
    assert_exact_search(query, keys, distances, indices, recipe.metric)


@settings(max_examples=60, deadline=None)
@given(
    recipe=recipes(CHANGES),
    bad=st.lists(st.tuples(st.booleans(), st.integers(0, 400), st.sampled_from([np.nan, np.inf, -np.inf])), min_size=1),
)
def test_rows_that_are_not_finite_change_nothing_for_the_others(
    recipe: Recipe, bad: list[tuple[bool, int, float]]
) -> None:
    query, keys = in_floats(recipe)
    for is_key, at, value in bad:
        rows = keys if is_key else query
        rows[at % len(rows), at % recipe.dim] = value
    distances, indices = search_every_way(query, keys, recipe.k, recipe.metric, recipe.split)
    assert_exact_search(query, keys, distances, indices, recipe.metric)


# --- rows that reach the bound of a screen ----------------------------------------------------------------------
#
# A screen computes each score with an error of at most some bound. A duel is a query q and a key a whose score has that
# whole error, against the key 0, whose score has none: 0 is the mean of the bank, as the bank holds the mirror image of
# every key. In integer arithmetic the two scores differ by a few units, so a bound that is a few percent too small, at
# the lower end or at the upper, drops the better of the two. The scores are those of centred rows, as in the notes
# beside the kernel: |a|^2/2 - q.a for l2, -q.a for ip and cosine.


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


def assert_duel_is_exact(duel: Duel, q: Rows, a: Rows) -> None:
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
    assert_exact_on_a_lattice(
        torch.from_numpy(query).to(form), torch.from_numpy(keys).to(form), 1.0, k, duel.metric, max(1, duel.count // 2)
    )


@st.composite
def duels(draw: st.DrawFn) -> Duel:
    levels = st.sampled_from([127, 127, 127, 128, 64, 63, 31, 15, 7])
    form, power = draw(st.sampled_from([(FORMATS[0], 7), (FORMATS[0], 4), (FORMATS[1], 1), (FORMATS[2], 3)]))
    half = 1 << power >> 1
    return Duel(
        metric=draw(st.sampled_from(METRICS)),
        levels=(draw(levels), draw(levels)),
        power=power,
        past_half=draw(st.one_of(st.sampled_from([-1, 1]), st.integers(-half, half - 1))),
        margin=draw(st.sampled_from([1, 2, 3, 20, 60])),
        pairs=draw(st.one_of(st.integers(1, 40), st.integers(100, 250))),
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


def quantised(row: Rows, levels: int) -> Rows:
    step = np.abs(row).max() / levels
    return np.round(row / step) * step


CODES = [(127, 127), (63, 127), (127, 63), (64, 127), (64, 64), (31, 127), (15, 15)]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("past_half", [-1, 1])
@pytest.mark.parametrize("levels", CODES)
def test_the_attack_itself_reaches_the_bound(metric: str, past_half: int, levels: tuple[int, int]) -> None:
    duel = Duel(metric, levels, past_half=past_half)
    q, a = balanced(duel, *half_steps(duel))
    q_code, a_code = quantised(q, levels[0]), quantised(a, levels[1])
    bound = np.linalg.norm(q - q_code) * np.linalg.norm(a_code) + np.linalg.norm(q) * np.linalg.norm(a - a_code)
    assert -past_half * (q @ a - q_code @ a_code) > 0.98 * bound
    assert abs(a @ a / 2 - q @ a if metric == "l2" else q @ a) < 1e-6 * bound


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("past_half", [-1, 1])
@pytest.mark.parametrize("levels", CODES)
def test_the_error_of_a_code_can_be_the_whole_bound(metric: str, past_half: int, levels: tuple[int, int]) -> None:
    duel = Duel(metric, levels, past_half=past_half)
    q, a = half_steps(duel)
    for gap in (-4, 4):
        for count in (1, 40):
            # The last two have k = 1 (l2, all metrics) in a bank of more than a group of keys.
            for near, far, zeros in ((2, 20, 1), (0, 60, 1), (0, 0, 70)):
                assert_duel_is_exact(replace(duel, gap=gap, count=count, near=near, far=far, zeros=zeros), q, a)


@settings(max_examples=150, deadline=None)
@given(duel=duels())
def test_rows_around_the_middle_of_two_codes(duel: Duel) -> None:
    assert_duel_is_exact(duel, *half_steps(duel))


@pytest.mark.parametrize("past_half", [-1, 1])
@pytest.mark.parametrize("pairs", [4, 100, 450])
def test_float32_can_lose_every_term_of_a_sum(past_half: int, pairs: int) -> None:
    for gap in (-4, 4):
        for crowd in (0, 110):  # more than codes can tell apart, so float32 has to
            for near in (0, 2):
                duel = Duel(
                    "l2", past_half=past_half, pairs=pairs, gap=gap, near=near, far=5, crowd=crowd, count=40, seed=crowd
                )
                assert_duel_is_exact(duel, *lost_terms(duel))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("seed", range(3))
def test_rows_on_the_grid_leave_only_the_rounding_of_a_score(metric: str, seed: int) -> None:
    """Codes are the rows but for a factor, so no residual hides what float32 does to their integer product.

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
    for count in (1, 40):
        rows = query * random.choice([-1, 1], (count, 1))
        assert_exact_on_a_lattice(torch.from_numpy(rows).float(), torch.from_numpy(keys).float(), 1.0, k, metric, 7)


# --- large searches ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Large:
    """Rows on a lattice, a few units apart where it matters, and the truth for l2 and ip."""

    query: Tensor
    keys: Tensor
    truth: dict[str, Result]  # of the five nearest


LARGE = {
    "a million keys": (3, 1_000_000, 32),
    "a million keys, many queries": (20, 1_000_000, 8),
    "ten thousand queries": (10_000, 2_048, 64),
    "rows of 4,096": (40, 300, 4_096),
    "one key": (10_000, 1, 64),
    "one dimension": (50, 100_000, 1),
    "rows of 70,000": (9, 40, 70_000),
}


@pytest.fixture(scope="module", params=LARGE)
def large(request: pytest.FixtureRequest) -> Large:
    count, rows, dim = LARGE[request.param]
    random = np.random.default_rng(len(request.param))
    largest = largest_on_a_lattice(FORMATS[0], dim) // 4
    query = random.integers(-largest, largest, (count, dim)).astype(np.float64)
    keys = random.integers(-largest, largest, (rows, dim), dtype=np.int32).astype(np.float32)
    # Keys around every query (or so many): 16 at one distance but for a few units, some of them exactly.
    ties = 16
    for n in range(min(count, rows // (4 * ties))):
        difference = random.permuted(np.tile(random.integers(-largest, largest, dim) // 64, (ties, 1)), axis=1)
        difference[::2, 0] += random.integers(-1, 2, ties // 2)
        keys[random.integers(0, rows, ties)] = query[n] + difference
    tensors = torch.from_numpy(query).float(), torch.from_numpy(keys)
    k = min(5, rows)
    return Large(*tensors, {metric: order_on_a_lattice(*tensors, 1.0, k, metric) for metric in ("l2", "ip")})


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_large_searches_are_exact(isa: str, large: Large, metric: str) -> None:
    expected = large.truth[metric]
    prepared = memad_fast.prepare_keys(large.keys, metric=metric)
    part = len(large.query) // 3
    for threads in (1, 2, 3):
        with machine(isa, threads):
            for searched in (large.keys, prepared):
                got = memad_fast.nearest_keys(large.query, searched, expected[1].shape[1], metric=metric)
                assert torch.equal(got[1], expected[1])
                assert torch.equal(got[0], expected[0])
            assert torch.equal(
                memad_fast.nearest_keys(large.query[part:], prepared, metric=metric)[1], expected[1][part:, :1]
            )
