"""Which row has an id: for ids that count on by themselves ranges, for all others sorted runs.

Rows are named by their sequence number: how many rows were ever added before. A removed row is one whose number lies
below that of the oldest; its id may come again. Runs are merged when the last is no longer much smaller than the one
before, so that there are few (log n), a look-up costs O(log² n) and n additions O(n log n). 16 bytes an id in a run.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


class IdTable:
    """From ids to sequence numbers."""

    def __init__(self) -> None:
        self._runs: list[tuple[Ids, Ids]] = []  # ids ascending, and their sequence numbers
        self._ranges: list[tuple[int, int, int]] = []  # first id, its sequence number, how many

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(ids.nbytes + rows.nbytes for ids, rows in self._runs)

    def add_range(self, first_id: int, first_row: int, count: int, oldest: int) -> None:
        """Add ids that count on, larger than any before, for rows that do; forget ranges of rows before ``oldest``."""
        if count == 0:
            return
        self._ranges = [known for known in self._ranges if known[1] + known[2] > oldest]
        if self._ranges:
            last_id, last_row, last_count = self._ranges[-1]
            if (last_id + last_count, last_row + last_count) == (first_id, first_row):
                self._ranges[-1] = (last_id, last_row, last_count + count)
                return
        self._ranges.append((first_id, first_row, count))

    def add(self, ids: Ids, first_row: int, oldest: int) -> None:
        """Add the ids of consecutive rows; forget those of rows before ``oldest`` where runs are merged."""
        if len(ids) == 0:
            return
        order = np.argsort(ids, kind="stable")
        self._runs.append((ids[order], first_row + order))
        while len(self._runs) > 1 and len(self._runs[-2][0]) <= 2 * len(self._runs[-1][0]):
            (ids, rows), (more_ids, more_rows) = self._runs[-2:]
            ids, rows = np.concatenate((ids, more_ids)), np.concatenate((rows, more_rows))
            there = rows >= oldest
            ids, rows = ids[there], rows[there]
            order = np.argsort(ids, kind="stable")  # of two sorted runs: a merge
            self._runs[-2:] = [(ids[order], rows[order])]

    def find(self, ids: Ids, oldest: int) -> Ids:
        """The sequence number of each id, −1 where no row from ``oldest`` on has it."""
        found = np.full(len(ids), -1, dtype=np.int64)
        for known, rows in self._runs:  # no run holds an id twice: what it was merged from was there at once
            at = np.searchsorted(known, ids).clip(0, len(known) - 1)
            hit = (known[at] == ids) & (rows[at] >= oldest)
            found[hit] = rows[at[hit]]
        if self._ranges:
            first_ids, first_rows, counts = np.array(self._ranges, dtype=np.int64).T
            at = np.searchsorted(first_ids, ids, side="right") - 1
            row = ids - first_ids[at] + first_rows[at]
            hit = (at >= 0) & (ids - first_ids[at] < counts[at]) & (row >= oldest)
            found[hit] = row[hit]
        return found
