"""Greedy k-centre selection: the rows of a set that cover it best (PatchCore, section 3.2).

Starting from one row, the row that lies farthest from all chosen ones is chosen next. With f(x) the squared distance to
the nearest chosen row, one step is

    d(x) = ‖x‖² − 2 x·c + ‖c‖²      for the newest centre c: one matrix-vector product, norms computed once
    f(x) = min(f(x), d(x));  next c = argmax f (the lowest index of equals)

O(N·D) for each of the chosen rows and 3 floats a row of memory; the greedy choice is at most twice as far from covering
the set as the best choice of that size (Gonzalez 1985).

Source: K. Roth et al., "Towards Total Recall in Industrial Anomaly Detection", algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def greedy_coreset(
    features: Tensor, size: int, *, start: int = 0, progress: Callable[[int, int], None] | None = None
) -> Tensor:
    """Choose rows of ``features`` one by one, each the farthest from those chosen before.

    Args:
        features: ``[N, D]``, N ≥ 1, finite; float32 or float64 (narrower dtypes are taken as float32).
        size: how many rows, 1 to N. Once every row coincides with a chosen one (up to rounding), the rest are the rows
            not chosen yet, in order.
        start: the row to begin with.
        progress: called with (rows chosen, ``size``) after every row.

    Returns:
        ``[size]`` int64, in the order of choice, each row once; on the device of ``features``.

    Raises:
        TypeError: ``features`` is no floating tensor.
        ValueError: a wrong shape, a row that is not finite, or ``size`` or ``start`` out of range.

    Cost: 2·N·D operations for each chosen row; memory O(N) beside the features.

    Example:
        >>> import torch
        >>> from memad_fast.memory import greedy_coreset
        >>> greedy_coreset(torch.tensor([[0.0], [1.0], [10.0], [11.0]]), 3)
        tensor([0, 3, 1])
    """
    if not isinstance(features, Tensor) or not features.is_floating_point():
        kind = features.dtype if isinstance(features, Tensor) else type(features).__name__
        raise TypeError(f"features: expected a floating torch.Tensor, got {kind}")
    if features.dim() != 2 or features.shape[0] < 1:
        raise ValueError(f"features: expected [N, D] with at least one row, got shape {tuple(features.shape)}")
    rows = features.shape[0]
    if not 1 <= size <= rows:
        raise ValueError(f"size: expected 1 to {rows} (the number of rows), got {size}")
    if not 0 <= start < rows:
        raise ValueError(f"start: expected 0 to {rows - 1}, got {start}")
    wide = features.detach() if features.dtype == torch.float64 else features.detach().float()
    finite = wide.square().sum(dim=1).isfinite()
    if not bool(finite.all()):
        bad = (~finite).nonzero().flatten()[:5].tolist()
        raise ValueError(f"features: expected finite rows, got a NaN, an infinity or an overflow in rows {bad}")
    # Distances do not change by a shift, and near the origin the expanded form loses the fewest digits.
    wide = wide - wide.mean(dim=0)
    norms = wide.square().sum(dim=1)
    chosen = torch.empty(size, dtype=torch.int64, device=features.device)
    nearest = torch.full_like(norms, torch.inf)
    newest = torch.tensor(start, device=features.device)
    for count in range(size):
        chosen[count] = newest
        centre = wide.index_select(0, newest.reshape(1))[0]
        distance = torch.addmv(norms, wide, centre, alpha=-2).add_(norms.index_select(0, newest.reshape(1)))
        torch.minimum(nearest, distance.clamp_(min=0), out=nearest)
        nearest.index_fill_(0, newest.reshape(1), -1.0)  # a chosen row is never the farthest again
        newest = nearest.argmax()
        if progress is not None:
            progress(count + 1, size)
    return chosen
