"""What is measured: an index that is built of a file of rows, saved, opened again and searched for the nearest row."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.index.memories import MOST_STORED, Memory, Rows
from memad_fast.index import ExactIndex, FaissIndex

_TRAINED_ON = 64  # rows a cell; FAISS's own 256 take four times as long


class Contender(ABC):
    """One kind of index, for one memory."""

    name: str
    is_ours = False

    @abstractmethod
    def build(self, rows: Rows, place: Path) -> float:
        """Build it and save it at ``place``; hold nothing of it afterwards. The seconds that it took."""

    @abstractmethod
    def open(self, place: Path) -> None:
        """Make it ready to search."""

    @abstractmethod
    def search(self, query: Tensor) -> Tensor:
        """The number of the nearest row ``[N]``."""

    def settings(self) -> list[Any]:
        """What trades recall for time, from the fastest to the most thorough."""
        return []

    def set(self, setting: Any) -> None:
        """Search so from now on."""
        raise NotImplementedError(f"{self.name} has no settings")


class Exact(Contender):
    """``ExactIndex``, rows on disk, with as much RAM as it likes or a share of what the rows take in float32."""

    is_ours = True

    def __init__(self, memory: Memory, share: float | None = None) -> None:
        self.name = "ExactIndex" if share is None else f"ExactIndex, memory_budget {share:g} of the rows"
        self._dim = memory.dim
        self._budget = None if share is None else int(share * memory.float_bytes)

    def build(self, rows: Rows, place: Path) -> float:
        index = ExactIndex(self._dim, path=place, memory_budget=self._budget)
        spent = sum(seconds(lambda block=block: index.add(block)) for block in rows.blocks())
        spent += seconds(index.save)
        index.close()
        return spent

    def open(self, place: Path) -> None:
        self._index = ExactIndex.open(place, memory_budget=self._budget)

    def search(self, query: Tensor) -> Tensor:
        return self._index.search(query).ids[:, 0]


class Quick(Contender):
    """``FaissIndex``: codes in FAISS's lists, the original rows on disk, read to order its candidates exactly."""

    def __init__(self, memory: Memory, lists: int) -> None:
        self._dim, self._lists = memory.dim, lists
        self._factory = f"IVF{lists},SQ8"
        self.name = f"FaissIndex {self._factory}"

    def build(self, rows: Rows, place: Path) -> float:
        index = FaissIndex(self._dim, self._factory, rerank=4, path=place)
        spent = seconds(lambda: index.train(rows.sample(_TRAINED_ON * self._lists)))
        spent += sum(seconds(lambda block=block: index.add(block)) for block in rows.blocks())
        spent += seconds(index.save)
        index.close()
        return spent

    def open(self, place: Path) -> None:
        self._index = FaissIndex.open(place)

    def search(self, query: Tensor) -> Tensor:
        return self._index.search(query).ids[:, 0]

    def settings(self) -> list[Any]:
        return _doubled(self._lists)

    def set(self, setting: Any) -> None:
        self._index.set(nprobe=setting)
        self.name = f"FaissIndex {self._factory}, nprobe {setting}, rerank 4"


@dataclass
class Faiss(Contender):
    """An index of FAISS, by its factory string."""

    name: str
    dim: int
    factory: str
    parameter: str = ""
    values: list[int] = field(default_factory=list)

    def build(self, rows: Rows, place: Path) -> float:
        return seconds(lambda: self._build(rows, place))

    def _build(self, rows: Rows, place: Path) -> None:
        import faiss

        index = faiss.index_factory(self.dim, self.factory)
        array = rows.array()
        if not index.is_trained:
            index.train(rows.sample(_TRAINED_ON * faiss.extract_index_ivf(index).nlist).numpy())
        index.add(array)  # at once: in blocks its buffer would grow to twice the rows
        faiss.write_index(index, str(place))

    def open(self, place: Path) -> None:
        import faiss

        self._index = faiss.read_index(str(place))
        self._set = faiss.ParameterSpace().set_index_parameter

    def search(self, query: Tensor) -> Tensor:
        return torch.from_numpy(self._index.search(query.numpy(), 1)[1][:, 0])

    def settings(self) -> list[Any]:
        return self.values

    def set(self, setting: Any) -> None:
        self._set(self._index, self.parameter, setting)
        self.name = f"{self.name.split(',')[0]}, {self.parameter} {setting}"


def seconds(call: Callable[[], object]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _doubled(most: int) -> list[int]:
    return [2**power for power in range(most.bit_length())]


def contenders(memory: Memory, most_hnsw_rows: int) -> list[Callable[[], Contender]]:
    """Those of a memory, ours first."""
    lists = min(4096, 2 ** round(math.log2(4 * memory.rows**0.5)))  # FAISS's advice: 4 to 16 times the root
    name, factory = f"faiss IVF{lists}", f"IVF{lists},Flat"
    found: list[Callable[[], Contender]] = [lambda: Exact(memory)]
    if memory.rows >= 10**6:  # where it is worth a thought
        found.append(lambda: Exact(memory, 0.3))
    if memory.rows > MOST_STORED:
        return found
    if memory.rows >= 10**5:
        found.append(lambda: Quick(memory, lists))
    found.append(lambda: Faiss("faiss Flat", memory.dim, "Flat"))
    found.append(lambda: Faiss(name, memory.dim, factory, "nprobe", _doubled(lists)))
    if memory.rows <= most_hnsw_rows:
        found.append(lambda: Faiss("faiss HNSW32", memory.dim, "HNSW32,Flat", "efSearch", _doubled(4096)[3:]))
    return found
