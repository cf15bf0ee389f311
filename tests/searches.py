"""Searches that are hard to get right, for the tests of nearest_keys on every device: rows by name and by recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

Rows = NDArray[np.float64]  # [n, D], holding values of the dtype under test
Random = np.random.Generator

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


# --- rows by name ------------------------------------------------------------------------------------------------


def near_ties(dim: int) -> tuple[Tensor, Tensor]:
    """Distances that differ by a few units of the last place of float32, far below its rounding."""
    query = torch.randn(20, dim)
    key = query[0] + torch.randn(dim)
    keys = key.repeat(200, 1)
    flips = torch.randint(0, dim, (200,))
    steps = torch.randint(-3, 4, (200,))
    keys[torch.arange(200), flips] *= 1 + steps * 2.0**-23
    return query, keys


def permuted_rows(dim: int) -> tuple[Tensor, Tensor]:
    """Every key holds the same numbers, and so every distance to a constant query is the same but for rounding."""
    row = torch.randn(dim)
    return torch.full((5, dim), 0.25), torch.stack([row[torch.randperm(dim)] for _ in range(100)])


def rising(dim: int) -> Tensor:
    return torch.logspace(6, -6, dim)


def far_clusters(rows: int) -> Tensor:
    return 1e5 * (torch.arange(rows) % 2)[:, None]


def any_power(rows: int) -> Tensor:
    return 10.0 ** torch.randint(-20, 15, (rows, 1))


ADVERSARIES: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "near ties": lambda: near_ties(64),
    "near ties of long rows": lambda: near_ties(1001),
    "permuted rows": lambda: permuted_rows(48),
    "all keys identical": lambda: (torch.randn(12, 9), torch.randn(9).repeat(300, 1)),
    "all keys identical, many queries": lambda: (torch.randn(300, 9), torch.randn(9).repeat(150, 1)),
    "all zero": lambda: (torch.zeros(12, 9), torch.zeros(300, 9)),
    "zero bank": lambda: (torch.randn(12, 9), torch.zeros(300, 9)),
    "duplicates": lambda: (torch.randn(30, 24), torch.randn(40, 24).repeat(6, 1)),
    "queries are keys": lambda: (lambda keys: (keys[::7].clone(), keys))(torch.randn(300, 40)),
    "offset 1e4": lambda: (torch.randn(30, 50) + 1e4, torch.randn(400, 50) + 1e4),
    "offset 1e6 in one dimension": lambda: (near_ties(50)[0] + torch.eye(50)[0] * 1e6, torch.randn(400, 50) + 1e6),
    "query far from the bank": lambda: (torch.randn(30, 50) + 1e6, torch.randn(400, 50)),
    "two far clusters": lambda: (torch.randn(30, 8), torch.randn(400, 8) + far_clusters(400)),
    "one far key": lambda: (torch.randn(30, 8), torch.cat([torch.randn(400, 8), torch.full((1, 8), 1e15)])),
    "denormals": lambda: (torch.randn(9, 20) * 1e-41, torch.randn(200, 20) * 1e-41),
    "squares underflow": lambda: (torch.randn(9, 20) * 1e-25, torch.randn(200, 20) * 1e-25),
    "huge": lambda: (torch.randn(9, 20) * 1e30, torch.randn(200, 20) * 1e30),
    "largest": lambda: (torch.randn(9, 20).sign() * 3.4e38, torch.randn(200, 20).sign() * 3.4e38),
    "some keys huge": lambda: (torch.randn(9, 20), torch.cat([torch.randn(200, 20), torch.randn(9, 20) * 1e30])),
    "queries huge": lambda: (torch.randn(9, 20) * 1e30, torch.randn(200, 20)),
    "one dominant dimension": lambda: (torch.randn(30, 33) * rising(33), torch.randn(300, 33) * rising(33)),
    "all magnitudes": lambda: (torch.randn(30, 12) * any_power(30), torch.randn(300, 12) * any_power(300)),
}


def one_dominant_dimension(count: int, dim: int) -> Tensor:
    """Its magnitude sets the scale of the codes, which leave nothing of the other dimensions."""
    rows = torch.randn(count, dim)
    rows[:, 1] = torch.where(torch.rand(count) < 0.5, 1000.0, -1000.0)
    return rows


# --- rows by recipe ---------------------------------------------------------------------------------------------


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


# Row lengths around those of vectors and tiles.
DIMS = (*range(1, 21), 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 256, 300)


@st.composite
def recipes(draw: st.DrawFn, changes: dict, dims: tuple[int, ...] = DIMS) -> Recipe:
    dim = draw(st.sampled_from(dims))
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


def largest_on_a_lattice(form: Format, dim: int) -> int:
    """The integers up to which the dtype holds the rows, and float64 the sums over them, exactly."""
    return min(2**form.bits, int((2**51 / dim) ** 0.5))


def on_a_lattice(recipe: Recipe, magnitude: int) -> tuple[Tensor, Tensor, float]:
    """(query, keys, unit): integers times a power of two, the largest value about 2^magnitude."""
    random = recipe.random()
    query, keys = recipe.fresh(random)
    largest = largest_on_a_lattice(recipe.format, recipe.dim)
    scale = random.uniform(0, 1) * largest / max(np.abs(query).max(), np.abs(keys).max(), 1e-9)
    query, keys = np.round(query * scale), np.round(keys * scale)
    for plant in recipe.plants:
        getattr(Planter(random, query, keys, np.ones_like), plant)()
    rows = [np.clip(np.round(part), -largest, largest) for part in (query, keys)]
    bits = int(np.log2(max(1.0, np.abs(rows[0]).max(), np.abs(rows[1]).max())))
    form = recipe.format
    unit = 2.0 ** min(max(magnitude - bits, form.lowest), form.highest)
    query, keys = (torch.from_numpy(part * unit).to(form.dtype) for part in rows)
    return query, keys, unit


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
