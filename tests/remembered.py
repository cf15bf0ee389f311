"""What an index must answer, by plain lists and brute force in float64: for the tests of memad_fast.index."""

from __future__ import annotations

import torch
from torch import Tensor

from memad_fast.index import Index
from memad_fast.ops.nearest_keys import reference


class Remembered:
    """All live rows in order of age, with ids and values."""

    def __init__(self, dim: int, metric: str = "l2", capacity: int | None = None, values_dim: int | None = 2) -> None:
        self.dim, self.metric, self.capacity, self.values_dim = dim, metric, capacity, values_dim
        self.keys = torch.empty(0, dim)
        self.ids = torch.empty(0, dtype=torch.int64)
        self.values = torch.empty(0, values_dim or 0)

    def add(self, keys: Tensor, ids: Tensor, values: Tensor | None = None) -> None:
        self.keys, self.ids = torch.cat((self.keys, keys)), torch.cat((self.ids, ids))
        self.values = torch.cat((self.values, torch.empty(len(keys), 0) if values is None else values))
        if self.capacity is not None:
            self.remove_oldest(max(0, len(self.keys) - self.capacity))

    def remove_oldest(self, n: int) -> None:
        self.keys, self.ids, self.values = self.keys[n:], self.ids[n:], self.values[n:]


def assert_same(index: Index, expected: Remembered, query: Tensor | None = None, k: int = 4) -> None:
    """The same rows in the same order, and the same answers; beyond the rows −1, NaN and zeros."""
    assert len(index) == len(expected.keys)
    pieces = list(index.pieces())  # type: ignore[attr-defined]
    assert torch.equal(torch.cat([expected.keys[:0], *(piece.keys for piece in pieces)]), expected.keys)
    assert torch.equal(torch.cat([expected.ids[:0], *(piece.ids for piece in pieces)]), expected.ids)
    if expected.values_dim is not None:
        assert torch.equal(torch.cat([expected.values[:0], *(piece.values for piece in pieces)]), expected.values)
    if len(index) == 0:
        return
    if query is None:
        query = torch.cat((torch.randn(7, expected.dim).to(expected.keys.dtype).round(), expected.keys[:2]))
    distances, ids, values = index.search(query, k)
    there = min(k, len(index))
    exact = expected.keys.double()
    want, rows = reference(query.double(), exact, there, metric=expected.metric)
    if expected.metric == "cosine":  # its quotients are rounded: only the values are those of any order of summation
        torch.testing.assert_close(distances[:, :there].double(), want, atol=1e-7, rtol=1e-6)
    else:
        assert torch.equal(distances[:, :there], want.float())
        assert torch.equal(ids[:, :there], expected.ids[rows])
        if values is not None:
            assert torch.equal(values[:, :there], expected.values[rows])
    assert (ids[:, there:] == -1).all()
    assert distances[:, there:].isnan().all()
    assert values is None or not values[:, there:].any()
