"""The memories that are searched, and which of their rows are the nearest.

Rows are what a small network makes of 16 numbers: correlated and clustered, as the features of patches are.
"gaussian": independent numbers, the worst case for what FAISS prunes with. Queries are further rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BLOCK = 1 << 16
MOST_STORED = 20_000_000  # rows that lie in a file, for FAISS too; of larger memories only ours is measured
_QUERIES = 2**31  # the seed of the queries: no block's
_INNER, _HIDDEN, _NOISE = 16, 64, 0.02
_CANDIDATES = 4  # rows of a block that float64 products call the nearest: their errors are far below the gaps


@dataclass(frozen=True)
class Memory:
    """So many rows of so many numbers."""

    rows: int
    dim: int
    kind: str = "patches"

    @property
    def name(self) -> str:
        count = self.rows
        short = (
            f"{count // 10**6} M" if count % 10**6 == 0 else f"{count // 1000} k" if count % 1000 == 0 else f"{count}"
        )
        return f"{short} x {self.dim}" + ("" if self.kind == "patches" else f" {self.kind}")

    @property
    def float_bytes(self) -> int:
        """Of the rows, in float32."""
        return 4 * self.rows * self.dim

    def queries(self, count: int) -> Tensor:
        """Rows that are not in the memory."""
        return self._made(_QUERIES, count)

    def rows_in(self, folder: Path) -> Rows:
        """All rows, in a file where there is room for one beside the indexes."""
        if self.rows > MOST_STORED:
            return Rows(self)
        path = folder / "rows.npy"
        array = np.lib.format.open_memmap(path, "w+", np.float32, (self.rows, self.dim))
        for number in range(self.block_count):
            array[number * BLOCK :][:BLOCK] = self.block(number).numpy()
        array.flush()
        return Rows(self, path)

    @property
    def block_count(self) -> int:
        return -(-self.rows // BLOCK)

    def block(self, number: int) -> Tensor:
        """Rows [number * BLOCK, ...), BLOCK of them or what is left."""
        return self._made(number, min(BLOCK, self.rows - number * BLOCK))

    def _made(self, seed: int, count: int) -> Tensor:
        network = torch.Generator().manual_seed(self.dim)
        into = torch.randn(_INNER, _HIDDEN, generator=network)
        out = torch.randn(_HIDDEN, self.dim, generator=network) / _HIDDEN**0.5
        generator = torch.Generator().manual_seed(seed)
        if self.kind == "gaussian":
            return torch.randn(count, self.dim, generator=generator)
        rows = (torch.randn(count, _INNER, generator=generator) @ into).relu_() @ out
        return rows.add_(torch.randn(count, self.dim, generator=generator), alpha=_NOISE)


@dataclass(frozen=True)
class Rows:
    """The rows of a memory: on a file's pages, so that they do not count as an index's RAM, or made by every pass."""

    memory: Memory
    path: Path | None = None

    def array(self) -> NDArray[np.float32]:
        """All of them, in the file."""
        assert self.path is not None
        return np.load(self.path, mmap_mode="r")

    def blocks(self) -> Iterator[Tensor]:
        """``BLOCK`` at a time."""
        for number in range(self.memory.block_count):
            if self.path is None:
                yield self.memory.block(number)
            else:
                yield torch.from_numpy(np.array(self.array()[number * BLOCK :][:BLOCK]))

    def sample(self, count: int) -> Tensor:
        """Rows from all over the memory."""
        return self.of(torch.arange(0, self.memory.rows, max(1, self.memory.rows // count)))

    def of(self, numbers: Tensor) -> Tensor:
        """Rows by their numbers."""
        if self.path is not None:
            return torch.from_numpy(self.array()[numbers.numpy()])
        found = torch.empty(len(numbers), self.memory.dim)
        for block in (numbers // BLOCK).unique().tolist():
            here = numbers // BLOCK == block
            found[here] = self.memory.block(block)[numbers[here] % BLOCK]
        return found


def nearest(query: Tensor, rows: Rows) -> Tensor:
    """The squared distance of each query to its nearest row, from float64 differences ``[N]``."""
    wide = query.double()
    best = torch.full((len(query),), torch.inf, dtype=torch.float64)
    for block in rows.blocks():
        keys = block.double()
        scores = torch.addmm(keys.square().sum(1) / 2, wide, keys.T, alpha=-1.0)
        near = scores.topk(min(_CANDIDATES, len(keys)), largest=False).indices
        best = torch.minimum(best, (wide[:, None] - keys[near]).square().sum(2).min(1).values)
    return best


def distances(query: Tensor, rows: Rows, numbers: Tensor) -> Tensor:
    """The squared distances of queries to the rows that an index named, from float64 differences ``[N]``."""
    return (query.double() - rows.of(numbers).double()).square().sum(1)
