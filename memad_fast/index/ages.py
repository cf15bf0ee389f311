"""How old the rows of a shard are among those of all shards.

A row has a sequence number in its own shard, and one among all shards: how many rows came before it there. Rows that
were added in one call follow each other in both, so a shard keeps where such runs begin: 16 bytes a call.

    here       0 ······· 40 ·········· 90 ····        40 rows of the first call, 50 of the second, …
    over all   0 ······· 100 ········· 180 ···        another shard got 60 rows of the first call
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor


class Ages:
    """From sequence numbers of a shard ("here") to those over all shards, and back."""

    def __init__(self, here: Tensor | None = None, over_all: Tensor | None = None) -> None:
        self._here = array("q", [0] if here is None else here.tolist())
        self._over_all = array("q", [0] if over_all is None else over_all.tolist())

    def __len__(self) -> int:
        """The number of runs."""
        return len(self._here)

    def tensors(self) -> dict[str, Tensor]:
        """Where runs begin, as ``__init__`` takes them."""
        names = {"here": self._here, "over_all": self._over_all}
        return {name: torch.from_numpy(np.array(begins, dtype=np.int64)) for name, begins in names.items()}

    def append(self, here: int, over_all: int) -> None:
        """Rows from ``here`` on, which follow the last, have numbers from ``over_all`` on."""
        if over_all - here != self._over_all[-1] - self._here[-1]:
            self._here.append(here)
            self._over_all.append(over_all)

    def shrink_to(self, count: int) -> None:
        """Forget the newest runs."""
        del self._here[count:], self._over_all[count:]

    def forget_before(self, here: int) -> None:
        """Forget runs of rows before ``here``; the last stays."""
        gone = max(0, min(bisect_right(self._here, here), len(self)) - 1)
        del self._here[:gone], self._over_all[:gone]

    def over_all(self, here: Tensor) -> Tensor:
        """The numbers over all shards of rows by their numbers here; −1 stays −1."""
        begins, numbers = (begin.to(here.device) for begin in self.tensors().values())
        run = (torch.bucketize(here, begins, right=True) - 1).clamp(min=0)
        return torch.where(here < 0, here, here + (numbers - begins)[run])

    def first_from(self, over_all: int, end: int) -> int:
        """The number here of the first row from ``over_all`` on; ``end`` where there is none."""
        run = bisect_right(self._over_all, over_all) - 1
        if run < 0:
            return self._here[0]
        run_end = self._here[run + 1] if run + 1 < len(self) else end
        return min(self._here[run] + over_all - self._over_all[run], run_end)

    def runs(self, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
        """The runs of the rows ``begin`` to ``end`` (exclusive) here: begin, number over all, how many rows."""
        run = bisect_right(self._here, begin) - 1
        while begin < end:
            run_end = min(end, self._here[run + 1]) if run + 1 < len(self) else end
            yield begin, self._over_all[run] + begin - self._here[run], run_end - begin
            begin, run = run_end, run + 1
