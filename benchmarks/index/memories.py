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
        return self._block(-1, count)

    def write(self, folder: Path) -> Path:
        """All rows as a .npy file: what an index is built of must not count as its memory."""
        path = folder / f"{self.name.replace(' ', '')}.npy"
        array = np.lib.format.open_memmap(path, "w+", np.float32, (self.rows, self.dim))
        for number, first in enumerate(range(0, self.rows, BLOCK)):
            count = min(BLOCK, self.rows - first)
            array[first : first + count] = self._block(number, count).numpy()
        array.flush()
        return path

    def _block(self, number: int, count: int) -> Tensor:
        network = torch.Generator().manual_seed(self.dim)
        into = torch.randn(_INNER, _HIDDEN, generator=network)
        out = torch.randn(_HIDDEN, self.dim, generator=network) / _HIDDEN**0.5
        generator = torch.Generator().manual_seed(number % 2**31)
        if self.kind == "gaussian":
            return torch.randn(count, self.dim, generator=generator)
        rows = (torch.randn(count, _INNER, generator=generator) @ into).relu_() @ out
        return rows.add_(torch.randn(count, self.dim, generator=generator), alpha=_NOISE)


def blocks(path: Path) -> Iterator[NDArray[np.float32]]:
    """The rows of a file, on its pages."""
    array = np.load(path, mmap_mode="r")
    for first in range(0, len(array), BLOCK):
        yield array[first : first + BLOCK]


def nearest(query: Tensor, path: Path) -> Tensor:
    """The squared distance of each query to its nearest row, from float64 differences ``[N]``."""
    wide = query.double()
    best = torch.full((len(query),), torch.inf, dtype=torch.float64)
    for block in blocks(path):
        rows = torch.from_numpy(np.array(block)).double()
        scores = torch.addmm(rows.square().sum(1) / 2, wide, rows.T, alpha=-1.0)
        near = scores.topk(min(_CANDIDATES, len(rows)), largest=False).indices
        best = torch.minimum(best, (wide[:, None] - rows[near]).square().sum(2).min(1).values)
    return best


def distances(query: Tensor, path: Path, ids: Tensor) -> Tensor:
    """The squared distances of queries to the rows that an index named, from float64 differences ``[N]``."""
    array = np.load(path, mmap_mode="r")
    return (query.double() - torch.from_numpy(array[ids.numpy()]).double()).square().sum(1)
