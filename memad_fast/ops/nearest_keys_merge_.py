"""A search that goes on over further keys: what memories that come in pieces (``memad_fast.index``) are read by.

The best so far are float64 values and indices, so that a search in pieces is the search of all keys: same indices, same
order, ties included. What was found in one piece also prunes the next.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memad_fast._arguments import METRICS, check_choice
from memad_fast._backend import served_by_cpu
from memad_fast._checks import check_rank, check_size, check_tensor
from memad_fast._library import define, write
from memad_fast.ops.nearest_keys import check_search, nearest_keys, values
from memad_fast.ops.prepare_keys import PreparedKeys, split_keys


def nearest_keys_merge_(
    ranks: Tensor,
    indices: Tensor,
    query: Tensor,
    keys: Tensor | PreparedKeys,
    *,
    first: int = 0,
    last: int | None = None,
    offset: int = 0,
    metric: str = "l2",
) -> None:
    """Merge each query's nearest of further keys into the nearest so far, in place.

    Starting from ``ranks`` full of NaN and ``indices`` full of −1, calls for all pieces of a bank, in any order, leave
    what ``nearest_keys`` of the whole bank finds.

    Args:
        ranks: ``[N, k]`` float64, contiguous, written in place: the values that ``nearest_keys`` compares, ascending
            (for "ip" the negative inner product); NaN in slots that are still empty, which come last.
        indices: ``[N, k]`` int64, contiguous, written in place: the keys' indices; −1 in empty slots.
        query: ``[N, D]``, as in ``nearest_keys``.
        keys: ``[M, D]`` or ``PreparedKeys``: a piece of the bank. M ≥ 1.
        first: only keys ``first`` to ``last`` (exclusive) are searched.
        last: see ``first``; default M.
        offset: the index of the piece's row 0 in the bank.
        metric: as in ``nearest_keys``.

    Gradients: none. Cost: that of ``nearest_keys`` on the searched keys; on a CPU fewer float64 values, as what was
    found before already rules most keys out. On a GPU, and by the reference, every piece is searched by
    ``nearest_keys`` and merged by a sort.

    Raises:
        TypeError: a wrong type or dtype, or different dtypes.
        ValueError: a wrong shape or device, ``ranks`` or ``indices`` not contiguous, a range that is not within the
            keys, an unknown metric, or one that differs from the prepared keys'.

    Example:
        >>> import torch
        >>> from memad_fast.ops import nearest_keys_merge_
        >>> ranks, indices = torch.full((1, 2), torch.nan, dtype=torch.float64), torch.full((1, 2), -1)
        >>> nearest_keys_merge_(ranks, indices, torch.zeros(1, 1), torch.tensor([[3.0], [1.0]]))
        >>> nearest_keys_merge_(ranks, indices, torch.zeros(1, 1), torch.tensor([[2.0]]), offset=2)
        >>> ranks, indices
        (tensor([[1., 4.]], dtype=torch.float64), tensor([[1, 2]]))
    """
    check_choice("metric", metric, METRICS)
    rows, packed = split_keys(keys, metric)
    check_search(query, rows)
    last = rows.shape[0] if last is None else last
    if not 0 <= first <= last <= rows.shape[0]:
        raise ValueError(f"first, last: expected a range within 0 to {rows.shape[0]}, got {first} to {last}")
    for name, best, dtype in (("ranks", ranks, torch.float64), ("indices", indices, torch.int64)):
        check_tensor(name, best)
        if best.dtype != dtype:
            raise TypeError(f"{name}: expected {dtype}, got {best.dtype}")
        if best.device != query.device:
            raise ValueError(f"{name}: expected device {query.device} like query, got {best.device}")
        check_rank(name, best, 2, "[N, k]")
        check_size(name, best, 0, query.shape[0], "like query")
        if not best.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, as it is written in place")
    check_size("indices", indices, 1, ranks.shape[1], "like ranks")
    if first == last or ranks.shape[1] == 0:
        return
    if served_by_cpu(query):
        op = torch.ops.memad_fast.nearest_keys_merge_.default
        write(op, ranks, indices, query.detach(), rows.detach(), packed, first, last, offset, metric)
    else:
        _merge(ranks, indices, query.detach(), keys, first, last, offset, metric)


@torch.no_grad()
def _merge(
    ranks: Tensor, indices: Tensor, query: Tensor, keys: Tensor | PreparedKeys, first: int, last: int, offset: int,
    metric: str,
) -> None:  # fmt: skip
    """Search the piece alone, then sort what was found with what there was, by value and index."""
    rows, _ = split_keys(keys, metric)
    whole = first == 0 and last == rows.shape[0]
    k = ranks.shape[1]
    _, found = nearest_keys(query, keys if whole else rows[first:last], min(k, last - first), metric=metric)
    missing = found < 0
    found = (found + first).masked_fill(missing, 0)
    new_ranks = values(query[:, None], rows[found], metric).masked_fill(missing, torch.nan)
    new_ranks = -new_ranks if metric == "ip" else new_ranks
    all_indices = torch.cat((indices, (found + offset).masked_fill(missing, -1)), dim=1)
    all_ranks = torch.cat((ranks, new_ranks), dim=1)
    order = best_first(all_ranks, all_indices)[:, :k]
    ranks.copy_(all_ranks.gather(1, order))
    indices.copy_(all_indices.gather(1, order))


def best_first(ranks: Tensor, indices: Tensor) -> Tensor:
    """The order ``[N, m]`` of each query's candidates by value, then by index; empty slots last."""
    by_index = indices.argsort(dim=1, stable=True)
    return by_index.gather(1, ranks.gather(1, by_index).argsort(dim=1, stable=True))  # NaN comes last


define(
    "nearest_keys_merge_(Tensor(a!) ranks, Tensor(b!) indices, Tensor query, Tensor keys, Tensor? packed, int first,"
    " int last, int offset, str metric) -> ()",
    fake=lambda ranks, indices, query, keys, packed, first, last, offset, metric: None,
)
