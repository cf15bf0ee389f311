"""What every large memory is to the code around it: rows go in with ids and values, the nearest come out.

add ──► newest row                     order of age, whatever the ids are
        …                              search sees all rows that are there
        oldest row ──► remove_oldest, or pushed out where the capacity is fixed (a ring)
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn, SupportsIndex

import torch
from torch import Tensor


class Found(NamedTuple):
    """What a search found; unpacks as (distances, ids, values)."""

    distances: Tensor  # [N, k] float32: squared Euclidean distance ("l2"), 1 − cosine, or the inner product ("ip")
    ids: Tensor  # [N, k] int64, best first; −1 (and distance NaN) where there are fewer than k rows
    values: Tensor | None  # [N, k, V] in the dtype they were added in, zeros at id −1; None in an index without values


def joined(found: Sequence[Found]) -> Found:
    """What was found for blocks of queries, as of one search for all; at least one block."""
    if len(found) == 1:
        return found[0]
    distances, ids, values = zip(*found, strict=True)
    return Found(torch.cat(distances), torch.cat(ids), None if values[0] is None else torch.cat(values))


@dataclass(frozen=True)
class IndexStats:
    """How large an index is."""

    rows: int
    dim: int
    metric: str
    kind: str  # "exact", or the factory string of FAISS
    ram_bytes: int  # held in memory: codes, ids, values, and rows that are not mapped
    disk_bytes: int  # files of the index, mapped rows among them
    capacity: int | None


class Index(ABC):
    """A memory of rows ``[n, dim]`` with ids, and values if wanted, that is searched for the nearest.

    Rows come and go in order of age. ``add`` and ``remove_oldest`` change what is in memory; ``save`` makes it last.
    An index is neither copied nor pickled, and so is no module that holds one: it may be larger than RAM, and its
    folder has one writer. Save it, and open it where it is wanted.
    """

    dim: int
    metric: str
    dtype: torch.dtype  # of keys and queries
    device: torch.device  # where keys and queries come from
    values_dim: int | None  # None: an index without values
    values_dtype: torch.dtype
    capacity: int | None  # rows that there is room for; further ones push out the oldest. None: as many as come

    @property
    @abstractmethod
    def path(self) -> Path | None:
        """The folder that ``save()`` writes to; None where there is none yet."""

    @property
    @abstractmethod
    def next_id(self) -> int:
        """The id that the next row gets if none is given: one more than the largest ever added."""

    @abstractmethod
    def __len__(self) -> int:
        """The number of rows."""

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        """Refuse a copy.

        Raises:
            TypeError: always.
        """
        raise TypeError(f"{type(self).__name__}: an index is neither copied nor pickled; save it, and open it again")

    @abstractmethod
    def add(self, keys: Tensor, values: Tensor | None = None, ids: Tensor | Sequence[int] | None = None) -> Tensor:
        """Add rows as the newest, all or none of them; their ids."""

    @abstractmethod
    def search(self, query: Tensor, k: int = 1) -> Found:
        """The k nearest rows of each query ``[N, dim]``; ties, where the index is exact, to the oldest row.

        Raises:
            ValueError: the index is empty.
        """

    @abstractmethod
    def remove_oldest(self, n: int) -> None:
        """Remove the n oldest rows."""

    def _check_removable(self, n: int) -> None:
        if isinstance(n, bool) or not isinstance(n, int):
            raise TypeError(f"n: expected an int, got {type(n).__name__}")
        if not 0 <= n <= len(self):
            raise ValueError(f"n: expected 0 to {len(self)} (the number of rows), got {n}")

    @abstractmethod
    def merge(self, others: Sequence[Index]) -> None:
        """Add the rows of other indexes of the same kind, oldest first, with their ids and values."""

    @abstractmethod
    def save(self, path: str | os.PathLike[str] | None = None) -> None:
        """Write the index to a folder (default: its own); when it returns, what was added survives a crash."""

    @abstractmethod
    def close(self) -> None:
        """Let others write to the folder; the index can be searched on, but not changed."""

    @abstractmethod
    def stats(self) -> IndexStats:
        """Sizes in rows and bytes."""
