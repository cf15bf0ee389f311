"""Greedy k-centre selection: the rows of a set that cover it best (PatchCore, section 3.2).

Starting from one row, the row that lies farthest from all chosen ones is chosen next. With f(x) the squared distance to
the nearest chosen row, one step is

    c = argmax f, the lowest index of equals;    f(x) = min(f(x), Σ(x − c)²) for every row

The greedy choice is at most twice as far from covering the set as the best choice of that size (Gonzalez 1985).

Done as written, every step reads all N·D values for two operations each: 77 MB for 50,000 rows of 384, whatever the
processor could compute meanwhile. But f only falls. What was known of a row some steps ago bounds it from above, and a
row whose bound is below the largest f cannot be the next. So rows are left behind, and those that could be next catch
up with all centres they missed at once: a search of many rows among many centres, as ``nearest_keys`` does it: on int8
codes in the cache, with the values of float64. What a leaf computes for itself, in float64 too, is not kept: so all
that is kept is of one making, and equal rows are equally far.

    all rows           N       by their bounds, some hundreds of steps old
      └ pool           N/8     the farthest by bound; brought up to date when taken
          └ pool       N/64    the farthest of those; and so on
              └ leaf   ≤ 64    step by step: the newest centre against 64 rows

Of those left outside a pool one is the first that could come next, its rival. Choices are made within a leaf, until its
farthest row does not come before the rival; then the pool above is looked at again. So each choice is the farthest of
all rows, and what order the work is done in shows nowhere.

What was learnt (one thread, patches of a convolutional network, 50,000 x 384):

- Of the first ten choices each changes what is known of most rows: they cost what the plain form costs, or more. Later
  a leaf gives 14 choices on average (of 500) or 32 (of 5,000), and a row has been compared with half to two thirds of
  the centres. So it pays the more, the more rows are chosen: 7 and 30 times the matrix-vector form's speed.
- The comparisons themselves are the smaller part. Making codes of the rows that catch up, and gathering them from all
  over the features, is the larger: hence many centres at once. Fewer at once save a fifth of the comparisons, and lose.
- Shares of 4 to 16 and leaves of 64 to 256 rows are within the noise of each other.

Source: K. Roth et al., "Towards Total Recall in Industrial Anomaly Detection", algorithm 1.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from memad_fast._checks import check_float, check_rank
from memad_fast._progress import Tell, progress_bar, untold
from memad_fast.ops import nearest_keys_merge_, prepare_keys
from memad_fast.ops.nearest_keys import values

_SHARE = 8  # of the rows of a pool, what the pool within it takes: one in so many
_LEAF = 64  # rows
_CENTRES = 1024  # compared at once
_BLOCK_BYTES = 8 << 20  # of rows compared at once

# Rows come one after the other by (−distance, index). A chosen row has the distance −1; before all of those comes:
_NO_RIVAL = (1.0, -1)


@torch.no_grad()
def greedy_coreset(features: Tensor, size: int | float, *, start: int = 0, progress: bool | Tell = False) -> Tensor:
    """Choose rows of ``features`` one by one, each the farthest from those chosen before.

    Args:
        features: ``[N, D]``, N ≥ 1, finite; float32, float16, bfloat16, or float64 (by the reference, which is slower).
            Any strides.
        size: how many rows: an int, 1 to N, or a float, the share of all rows, above 0 up to 1.0 (at least one row).
        start: the row to begin with, 0 to N − 1.
        progress: True shows a bar (which needs rich). A function is called with (rows chosen, rows to choose) after
            every row.

    Returns:
        ``[size]`` int64, in the order of choice, each row once; on the device of ``features``. Each is the farthest row
        by the float64 distances of the inputs, the lowest index of equals. Once every row coincides with a chosen one,
        the rest are the rows not chosen yet, in order.

    Raises:
        TypeError: ``features`` is no floating tensor, ``size`` or ``start`` no number.
        ValueError: a wrong shape, a row that is not finite (or whose squares overflow float64), or ``size`` or
            ``start`` out of range.
        ModuleNotFoundError: ``progress=True`` without rich.

    Gradients: none. Cost: at most 2·N·D operations for each chosen row, on int8 codes; the fewer, the more rows lie
    close to others. Memory beside the features: O(N), at most 64 bytes a row, and blocks of 8 MiB. On a GPU the steps
    of a leaf are made on the host: the two wait for each other some times in a leaf, not at every step. No GPU has run
    it yet.

    Example:
        >>> import torch
        >>> from memad_fast.memory import greedy_coreset
        >>> greedy_coreset(torch.tensor([[0.0], [1.0], [10.0], [11.0]]), 3)
        tensor([0, 3, 1])
    """
    check_float("features", features)
    check_rank("features", features, 2, "[N, D]")
    if len(features) == 0:
        raise ValueError(f"features: expected at least 1 row, got shape {tuple(features.shape)}")
    count = coreset_size(size, len(features))
    if isinstance(start, bool) or not isinstance(start, int):
        raise TypeError(f"start: expected an int, got {type(start).__name__}")
    if not 0 <= start < len(features):
        raise ValueError(f"start: expected 0 to {len(features) - 1}, got {start}")
    _check_finite(features)
    told = progress if callable(progress) else untold
    with progress_bar("coreset") if progress is True else nullcontext(told) as tell:
        return _Selection(features.detach(), count, tell).run(start)


def coreset_size(size: int | float, rows: int) -> int:
    """How many of ``rows`` rows ``size`` means: as many, or a share of them.

    Raises:
        TypeError: ``size`` is no number.
        ValueError: it is out of range.

    Example:
        >>> from memad_fast.memory.coreset import coreset_size
        >>> coreset_size(7, 50), coreset_size(0.1, 50), coreset_size(1.0, 50)
        (7, 5, 50)
    """
    if isinstance(size, bool) or not isinstance(size, (int, float)):
        raise TypeError(f"size: expected an int or a float, got {type(size).__name__}")
    if isinstance(size, float):
        if not 0.0 < size <= 1.0:
            raise ValueError(f"size: expected a share above 0.0 up to 1.0, got {size}")
        return max(1, round(size * rows))
    if not 1 <= size <= rows:
        raise ValueError(f"size: expected 1 to {rows} (the number of rows), got {size}")
    return size


class _Selection:
    """The rows chosen so far, and what is known of the others."""

    def __init__(self, features: Tensor, size: int, tell: Tell) -> None:
        self.features = features
        self.size = size
        self.tell = tell
        rows, device = len(features), features.device
        self.part_rows = max(1, _BLOCK_BYTES // max(1, features.shape[1] * features.dtype.itemsize))
        self.chosen = torch.empty(size, dtype=torch.int64, device=device)
        self.count = 0
        # Of every row: the squared distance to the nearest of the first ``seen`` centres. −1: it is chosen.
        self.distances = torch.full((rows,), torch.inf, dtype=torch.float64, device=device)
        self.seen = torch.zeros(rows, dtype=torch.int64, device=device)

    def run(self, start: int) -> Tensor:
        """Choose them all."""
        rows = torch.arange(len(self.features), device=self.features.device)
        self._take(rows[start : start + 1])
        for part in rows.split(self.part_rows):
            self._catch_up(part)
        self._choose(rows, _NO_RIVAL)
        return self.chosen

    def _choose(self, rows: Tensor, rival: tuple[float, int]) -> None:
        """Choose from ``rows`` (ascending, all before the rival by what is known) until none comes before the rival."""
        while self.count < self.size and len(rows):
            if len(rows) <= _LEAF:
                self._choose_step_by_step(rows, rival)
                return
            pool, first_outside = self._farthest(rows, max(_LEAF, len(rows) // _SHARE))
            pool = self._before(rival, pool)
            if len(pool) == 0:
                return
            if not self.distances[pool].any():
                self._take_what_is_left()
                return
            self._catch_up(pool)
            nearer_rival = min(rival, first_outside)
            self._choose(self._before(nearer_rival, pool), nearer_rival)

    def _choose_step_by_step(self, rows: Tensor, rival: tuple[float, int]) -> None:
        """The same from few rows that are up to date. On the host: such steps are too small for a GPU."""
        leaf, numbers = self.features.index_select(0, rows).cpu().double(), rows.tolist()
        distances = self.distances[rows].cpu()
        places: list[int] = []
        while self.count + len(places) < self.size:
            place = int(distances.argmax())
            if (-float(distances[place]), numbers[place]) >= rival:
                break
            places.append(place)
            distances[place] = -1.0
            torch.minimum(distances, values(leaf, leaf[place], "l2"), out=distances)
        self._take(rows[torch.tensor(places, dtype=torch.int64, device=rows.device)])

    def _farthest(self, rows: Tensor, count: int) -> tuple[Tensor, tuple[float, int]]:
        """The ``count`` first by what is known, in ascending order, and the first of the others."""
        distances = self.distances[rows]
        border = distances.topk(count + 1, sorted=False).values.min()  # of the first outside
        farther, equal = rows[distances > border], rows[distances == border]
        inside = count - len(farther)
        return torch.cat((farther, equal[:inside])).sort().values, (-float(border), int(equal[inside]))

    def _before(self, rival: tuple[float, int], rows: Tensor) -> Tensor:
        """Those of ``rows`` that come before the rival by what is known."""
        distances, (closeness, rival_row) = self.distances[rows], rival
        return rows[(distances > -closeness) | ((distances == -closeness) & (rows < rival_row))]

    def _catch_up(self, rows: Tensor) -> None:
        """Compare rows with the centres that they have not seen."""
        seen, order = self.seen[rows].sort()
        rows = rows[order]
        for first in range(int(seen[0]), self.count, _CENTRES):
            last = min(first + _CENTRES, self.count)
            centres = prepare_keys(self.features.index_select(0, self.chosen[first:last]))
            behind = rows[: int(torch.searchsorted(seen, last))]
            for part in behind.split(self.part_rows):
                distances = self.distances[part][:, None]
                queries = self.features.index_select(0, part)
                nearest_keys_merge_(distances, torch.zeros_like(part)[:, None], queries, centres)
                self.distances[part] = distances[:, 0]
        self.seen[rows] = self.count

    def _take(self, rows: Tensor) -> None:
        """Choose these rows, in their order."""
        self.chosen[self.count : self.count + len(rows)] = rows
        self.distances[rows] = -1.0
        for _ in range(len(rows)):
            self.count += 1
            self.tell(self.count, self.size)

    def _take_what_is_left(self) -> None:
        """Choose the first of the rows left: each coincides with a chosen one."""
        self._take((self.distances >= 0).nonzero()[: self.size - self.count, 0])


def _check_finite(features: Tensor) -> None:
    """The rows, and their squared distances, are finite in float64."""
    largest = torch.finfo(torch.float64).max / 4
    part_rows = max(1, _BLOCK_BYTES // max(1, 8 * features.shape[1]))
    for first in range(0, len(features), part_rows):
        squares = features[first : first + part_rows].double().square().sum(dim=1)
        bad = (~(squares <= largest)).nonzero()[:5, 0]
        if len(bad):
            named = (bad + first).tolist()
            raise ValueError(f"features: expected finite rows, got a NaN, an infinity or an overflow in rows {named}")
