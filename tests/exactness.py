"""What "exact" means for a search, as assertions.

For any inputs: strict outside the rounding of float64, optimal inside it. On a lattice (integers times a power of two)
float64 does not round, and there is nothing to allow for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memad_fast.ops.nearest_keys import values


def rounding_band(query: Tensor, keys: Tensor, metric: str) -> Tensor:
    """[N, M]: how far two float64 evaluations of a value, in different orders of summation, can lie apart."""
    steps = 4 * (query.shape[1] + 16) * 2.0**-53
    if metric == "l2":
        return steps * values(query[:, None], keys[None], "l2")
    if metric == "ip":
        return steps * query.double().norm(dim=1)[:, None] * keys.double().norm(dim=1)[None]
    return torch.full((query.shape[0], keys.shape[0]), steps, dtype=torch.float64)


def assert_exact_search(query: Tensor, keys: Tensor, distances: Tensor, indices: Tensor, metric: str = "l2") -> None:
    """(distances, indices) are the k nearest: in order, and no key left out is better.

    Where float64 values differ by more than their own rounding, the indices are decided; equal rows are decided by
    the lower index; between those two, any choice within the band passes. A row that is not finite neither finds nor
    is found.
    """
    searching, found_in = query.isfinite().all(dim=1), keys.isfinite().all(dim=1)
    if not (searching.all() and found_in.all()):
        position = found_in.cumsum(0) - 1  # of a finite key among the finite keys
        exist = min(int(found_in.sum()), indices.shape[1])
        for rest in (indices[~searching], indices[:, exist:]):
            assert (rest == -1).all(), "a key was found where there is none"
        assert torch.equal(distances.isnan(), indices == -1), "a distance without a key, or a key without a distance"
        distances, indices = distances[searching, :exist], indices[searching, :exist]
        assert found_in[indices].all(), "a key that is not finite was returned"
        if distances.numel() == 0:
            return
        query, keys, indices = query[searching], keys[found_in], position[indices]
    table = values(query[:, None], keys[None], metric)
    rank = -table if metric == "ip" else table
    band = rounding_band(query, keys, metric)
    k = indices.shape[1]
    assert indices.min() >= 0
    assert all(len(set(row)) == k for row in indices.tolist()), "a key was returned twice"

    found, found_band = rank.gather(1, indices), band.gather(1, indices)
    expected = table.gather(1, indices)
    # Rounded once: within half a float32 unit, and the band where float64 lies next to a rounding boundary.
    half_unit = 2.0**-24 * expected.abs() + 2.0**-150
    close = (distances.double() - expected).abs() <= half_unit * (1 + 1e-6) + found_band
    assert (close | (distances == expected.float())).all(), "a distance is wrong"  # the latter where it overflows

    assert (found[:, 1:] - found[:, :-1] >= -(found_band[:, 1:] + found_band[:, :-1])).all(), "not in order"
    _, order = rank.sort(dim=1, stable=True)
    worst, worst_band = found.max(dim=1, keepdim=True).values, found_band.max(dim=1, keepdim=True).values
    left_out = torch.ones_like(rank, dtype=torch.bool).scatter_(1, indices, False)
    assert not (left_out & (rank < worst - worst_band - band)).any(), "a better key was left out"

    same_row = (keys[order[:, :k]] == keys[indices]).all(dim=2)
    close = (rank.gather(1, order[:, :k]) - found).abs() <= found_band + band.gather(1, order[:, :k])
    assert (same_row | close).all(), "another key is decided"
    for n, j in (indices[:, 1:] < indices[:, :-1]).nonzero().tolist():
        first, second = indices[n, j], indices[n, j + 1]
        assert not torch.equal(keys[first], keys[second]), "equal rows out of the order of their indices"
    _assert_lowest_of_equal_rows(keys, indices)


def order_on_a_lattice(query: Tensor, keys: Tensor, unit: float, k: int, metric: str) -> tuple[Tensor, Tensor]:
    """The k nearest by l2 or ip where the rows are integers times ``unit``: exact, so ties are true ties.

    ``unit`` is a power of two. Every sum below is an integer under 2^53, whatever the order of summation.
    """
    q, rows = query.double() / unit, keys.double() / unit
    largest = max(float(q.abs().max()), float(rows.abs().max()))
    assert torch.equal(q, q.round())
    assert torch.equal(rows, rows.round())
    assert 4 * query.shape[1] * largest**2 <= 2**53, "the sums are not exact"
    product = q @ rows.T
    rank = -product if metric == "ip" else q.square().sum(1)[:, None] - 2 * product + rows.square().sum(1)
    worst = rank.topk(k, dim=1, largest=False).values[:, -1:]
    indices = torch.empty(len(query), k, dtype=torch.int64)
    for n, candidates in enumerate(rank <= worst):
        among = candidates.nonzero()[:, 0]  # by index, which the stable sort keeps among equals
        indices[n] = among[rank[n, among].sort(stable=True).indices[:k]]
    best = rank.gather(1, indices)
    return ((-best if metric == "ip" else best) * unit * unit).float(), indices


def _assert_lowest_of_equal_rows(keys: Tensor, indices: Tensor) -> None:
    """A row comes only after every equal row of a lower index."""
    _, group = torch.unique(keys, dim=0, return_inverse=True)
    size = int(group.max()) + 1
    place = torch.zeros(len(keys), dtype=torch.int64)  # among the equal rows, in order of the index
    seen = [0] * size
    for key, row in enumerate(group.tolist()):
        place[key] = seen[row]
        seen[row] += 1
    for row in indices:
        found: dict[int, int] = {}
        for key in row.tolist():
            member = int(group[key])
            assert int(place[key]) == found.get(member, 0), "an equal row of a lower index was left out"
            found[member] = found.get(member, 0) + 1
