"""FaissIndex: a memory that FAISS searches, in less than linear time; its rows stay, for all that FAISS cannot do.

    rows, ids, values      as in every StoredIndex, in RAM or on disk
    FAISS                  the same rows, as its factory string says, by sequence number:

        0 ······ first ·········· oldest ······················ taken
                 [      gone      |         found by FAISS        ]

Until there are enough rows to train FAISS all of them wait, and are searched exactly by ``nearest_keys``; from then on
FAISS has all. Rows that are gone stay in FAISS until they are half as many as those that live, and are left out of what
it finds. Whatever goes wrong in FAISS, it is emptied: all rows wait again, and are taken with the next change.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memad_fast.index.base import Found, Index, IndexStats, joined
from memad_fast.index.chunks import some
from memad_fast.index.files import Folder, IndexFileError, Part, PartRecord
from memad_fast.index.sizes import check_count
from memad_fast.index.stored import StoredIndex
from memad_fast.ops.nearest_keys import values as metric_values
from memad_fast.ops.nearest_keys_merge_ import best_first

# The names that faiss.ParameterSpace knows, some of which an index takes.
_SETTINGS = (
    "nprobe", "efSearch", "efConstruction", "k_factor_rf", "ht", "max_codes",
    "quantizer_nprobe", "quantizer_efSearch", "quantizer_efConstruction", "quantizer_k_factor_rf",
)  # fmt: skip
_LEAST_PER_CENTROID, _MOST_PER_CENTROID = 39, 256  # training rows: FAISS warns below, and samples above
_SEARCH_BYTES = 1 << 28  # of candidates, beside the results
_EXACT_VALUES = 1 << 22  # float64 values of rows that are compared at once: 32 MiB
_PART_BYTES = 1 << 26  # of FAISS's own file in one part


class FaissIndex(StoredIndex):
    """A memory that is searched by FAISS: faster than exactly where it is large, and not always the nearest.

    Args:
        dim: D, the length of a row; at least 1.
        factory: what FAISS builds, as in ``faiss.index_factory``: "Flat", "IVF1024,Flat", "HNSW32", "IVF4096,PQ64",
            "OPQ16_64,IVF1024,PQ16x4fs", "SQ8", "PQ16,RFlat", … NSG takes rows once only: not what is added later.
        metric: "l2" (squared Euclidean distance), "cosine" (1 − cosine) or "ip" (inner product), as ``nearest_keys``.
            FAISS gets rows of length 1 and compares inner products for "cosine".
        dtype: of the rows: float32, float16 or bfloat16. FAISS gets them in float32.
        faiss_device: where FAISS searches: "cpu", or "cuda", "cuda:1" with faiss-gpu. Keys, queries and results are on
            the CPU in both, where the original rows are. No GPU has run it yet.
        settings: of the search, by FAISS's names, as ``{"nprobe": 16}``; see ``set``.
        rerank: search for ``rerank`` · k candidates, and order them by float64 distances from the original rows.
            None: FAISS's own distances and order.
        training_rows: how many rows there must be for training. Default: 39 for each centroid of the factory, as FAISS
            advises (39,936 for "IVF1024"), and at least D; 0 for what needs no training ("Flat", "HNSW32").
        values_dim: V, if each row has values ``[V]``; None: no values.
        values_dtype: of the values.
        capacity: rows that there is room for; further ones push out the oldest. None: as many as come.
        chunk_rows: rows that are written and checked as one, as in ``ExactIndex``.
        path: a folder, new or empty, that rows are written to as chunks fill; they count from ``save`` on.
        mmap: read rows on disk where they lie. False: the rows stay in RAM too.

    Training. An index that starts empty answers at once: rows wait and are searched exactly until there are
    ``training_rows``. The ``add`` that brings them trains on a random sample (drawn with a fixed seed) of the rows that
    are there, at most 256 for each centroid, and gives FAISS all rows. ``train`` does it earlier, or again.

    Removing. Rows that are removed or pushed out are never found again. FAISS keeps them until they are half as many as
    those that live; where it finds so many of them that fewer than k rows are left, it is asked for more, and at last
    the query is searched exactly. Then IVF drops them in one pass; others, and IVF of fast scans ("PQ16x4fs"), are
    built anew from the rows, so that a row of a ring is given to FAISS three times on average: dear for "HNSW32".

    Memory. FAISS holds what its factory string says: "Flat" and "HNSW" all rows in float32, "PQ16" 16 bytes a row.
    The original rows come on top, and a folder (``path``, or ``open``) leaves them on disk; they are read for
    re-ranking, building anew, ``recall`` and ``rows``. The index is for one thread at a time; FAISS uses as many
    threads as ``torch.get_num_threads`` says.

    Raises:
        ModuleNotFoundError: neither faiss-cpu nor faiss-gpu is installed; or a GPU was asked for, and it is faiss-cpu.
        TypeError, ValueError: an argument is not what is said above, or FAISS cannot build ``factory`` (it says why).
        IndexFileError, FolderInUseError, OSError: as ``ExactIndex``.

    Example:
        >>> import torch
        >>> from memad_fast.index import FaissIndex
        >>> rows = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0))
        >>> index = FaissIndex(8, "IVF32,Flat", settings={"nprobe": 8})
        >>> _ = index.add(rows)
        >>> index.search(rows[:3]).ids.flatten().tolist()
        [0, 1, 2]
        >>> index.recall(rows[:100] + 0.1, k=5) > 0.8
        True
        >>> index.set(nprobe=32)  # all lists
        >>> index.recall(rows[:100] + 0.1, k=5)
        1.0
    """

    kind = "faiss"

    def __init__(
        self,
        dim: int,
        factory: str = "IVF1024,Flat",
        *,
        metric: str = "l2",
        dtype: torch.dtype = torch.float32,
        faiss_device: str | torch.device = "cpu",
        settings: Mapping[str, float] | None = None,
        rerank: int | None = None,
        training_rows: int | None = None,
        values_dim: int | None = None,
        values_dtype: torch.dtype = torch.float32,
        capacity: int | None = None,
        chunk_rows: int | None = None,
        path: str | os.PathLike[str] | None = None,
        mmap: bool = True,
    ) -> None:
        faiss = import_faiss()
        if not isinstance(factory, str):
            raise TypeError(f"factory: expected a factory string of FAISS, got {type(factory).__name__}")
        for name, count in (("rerank", rerank), ("training_rows", training_rows)):
            if count is not None:
                check_count(name, count)
        super().__init__(
            dim, metric=metric, dtype=dtype, device="cpu", values_dim=values_dim, values_dtype=values_dtype,
            capacity=capacity, chunk_rows=chunk_rows, budget=None, coded=False, mmap=mmap,
        )  # fmt: skip
        self.factory = factory
        self.rerank = rerank
        self.settings: dict[str, float] = {}
        self.faiss_device = torch.device(faiss_device)
        self._gpu = None if self.faiss_device.type == "cpu" else _gpu_resources(faiss, self.faiss_device)
        on_cpu = self._built_on_cpu()
        core = _core(faiss, on_cpu)
        self._takes_numbers = isinstance(core, (faiss.IndexIVF, faiss.IndexIDMap))
        # FAISS 1.8 ends the process where lists of the fast scan are to drop rows.
        self._drops_rows = isinstance(core, faiss.IndexIVF) and not isinstance(core, faiss.IndexIVFFastScan)
        centroids = _centroids(faiss, on_cpu)
        advised = 0 if on_cpu.is_trained else max(_LEAST_PER_CENTROID * centroids, dim)
        self.training_rows = training_rows if advised and training_rows is not None else advised
        self._most_training_rows = max(_MOST_PER_CENTROID * centroids, self.training_rows)
        if capacity is not None and capacity < self.training_rows:
            raise ValueError(
                f"capacity: expected at least the {self.training_rows} rows that {factory!r} is trained on, got"
                f" {capacity}; take more, a factory with fewer centroids, or pass training_rows"
            )
        self._faiss = self._placed(on_cpu)
        self._first = 0  # sequence number of the first row in FAISS
        self._taken = 0  # sequence number after the last row in FAISS
        self._training = ""  # names the training whose state FAISS is in
        self.set(**(settings or {}))
        self._begin_in(path)

    def __repr__(self) -> str:
        return f"FaissIndex({len(self)} x {self.dim}, {self.factory!r}, metric={self.metric!r})"

    def stats(self) -> IndexStats:
        """Sizes in rows and bytes; what FAISS holds is counted as it would be written, in one pass over it."""
        size = 0

        def count(block: bytearray) -> None:
            nonlocal size
            size += len(block)

        _write_faiss(self._on_cpu(), count)
        return IndexStats(
            rows=len(self),
            dim=self.dim,
            metric=self.metric,
            kind=self.factory,
            ram_bytes=self._held_bytes() + size,
            disk_bytes=0 if self._folder is None else self._folder.disk_bytes(),
            capacity=self.capacity,
        )

    def set(self, **settings: float) -> None:
        """Change settings by FAISS's names (``faiss.ParameterSpace``), such as ``nprobe=16`` or ``efSearch=64``.

        All or none are changed; they stay through training, ``save`` and ``open``, and are in ``settings``.

        Raises:
            TypeError: a value is not a number.
            ValueError: the index takes no setting of this name (those it takes are listed), or not this value.
        """
        taken = self._setting_names()
        for name, value in settings.items():
            if name not in taken:
                takes = f"takes {', '.join(taken)}" if taken else "takes none"
                raise ValueError(f"settings: {self.factory!r} {takes}; got {name!r}")
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
            least = 0 if name in ("ht", "max_codes") else 1  # 0: all
            if not least <= value < 2**31 or (not name.endswith("k_factor_rf") and value != int(value)):
                raise ValueError(f"{name}: expected a whole number of at least {least}, got {value}")
        self.settings |= settings
        self._apply_settings(self._faiss)

    # --- searching --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def search(self, query: Tensor, k: int = 1) -> Found:
        """The k nearest rows of each query, as far as FAISS finds them.

        Args:
            query: ``[N, D]``, dtype of the index, on the CPU. One with a NaN or an infinity finds nothing.
            k: how many; at least 1.

        Returns:
            ``Found(distances, ids, values)`` as in ``ExactIndex``: −1, NaN and 0 in the last slots where FAISS found
            fewer than k. With ``rerank`` distances are those of float64; without, FAISS's own: of rows as it keeps
            them, so approximate for codes like "PQ16".

        Gradients: none. Cost: FAISS's; ``rerank`` reads rerank · k rows a query, from disk where they lie there. Rows
        that wait for training cost an exact search, which packs them anew.

        Raises:
            TypeError, ValueError: query or k is not what is said above; the index is empty.
            IndexFileError: a part of the index on disk is torn or altered.
        """
        self._check_search(query, k)
        block = max(1, _SEARCH_BYTES // (64 * k * (self.rerank or 1)))
        return joined([self._found(*self._nearest(part, k)) for part in query.detach().split(block)])

    @torch.no_grad()
    def recall(self, query: Tensor, k: int = 1, *, exact: Index | None = None) -> float:
        """The share of the k nearest rows that ``search`` finds: 1.0 is all.

        A row that was found counts if it is no farther than the k-th nearest, in float64: among rows at the same
        distance none is the right one.

        Args:
            query: ``[N, D]`` as in ``search``, at least one of them finite.
            k: how many.
            exact: an index that finds the nearest by the same ids, such as an ``ExactIndex`` of the same rows. Default:
                the rows of this index are searched exactly, which packs them anew.

        Raises:
            TypeError, ValueError, IndexFileError: as ``search``; ``exact`` finds rows that are not in this index.
        """
        self._check_search(query, k)
        nearest = torch.full((len(query), k), -1, dtype=torch.int64)
        if exact is None:
            ranks = torch.full(nearest.shape, torch.nan, dtype=torch.float64)
            self._merge_nearest(ranks, nearest, query.detach(), self._oldest)
        else:
            ids = exact.search(query, k).ids.cpu()
            found = ids >= 0
            nearest[found] = torch.from_numpy(self._table().find(ids[found].numpy(), self._oldest))
            if (foreign := ids[found & (nearest < 0)]).numel():
                raise ValueError(f"exact: expected the rows of this index, found {some(foreign.numpy())}")
        if not (nearest >= 0).any():
            raise ValueError("query: expected at least one finite row")
        farthest = self._exact_ranks(query, nearest).nan_to_num(-torch.inf).amax(dim=1, keepdim=True)
        _, numbers = self._nearest(query.detach(), k)
        hits = self._exact_ranks(query, numbers) <= farthest
        return hits.sum().item() / (nearest >= 0).sum().item()

    def _nearest(self, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k best of each query: what the metric compares (float64, smallest first), and sequence numbers."""
        ranks = torch.full((len(query), k), torch.nan, dtype=torch.float64)
        numbers = torch.full((len(query), k), -1, dtype=torch.int64)
        if self._taken < self._tail.end:  # all wait
            self._merge_nearest(ranks, numbers, query, self._oldest)
            return ranks, numbers
        usable = query.isfinite().all(dim=1).nonzero()[:, 0]
        if len(usable) == 0:
            return ranks, numbers
        usual = query[usable]
        best_ranks, best_numbers, hidden = self._candidates(
            self._to_faiss(usual), min(k * (self.rerank or 1), len(self))
        )
        if self.rerank is not None:
            best_ranks = self._exact_ranks(usual, best_numbers)
        best_ranks, best_numbers = _best(best_ranks, best_numbers, k)
        there = best_numbers.shape[1]
        ranks[usable, :there], numbers[usable, :there] = best_ranks, best_numbers
        hidden = usable[hidden & (best_numbers[:, -1] < 0)]
        if len(hidden):  # a graph may lead to nothing but rows that are gone
            exact_ranks, exact_numbers = torch.full_like(ranks[hidden], torch.nan), torch.full_like(numbers[hidden], -1)
            self._merge_nearest(exact_ranks, exact_numbers, query[hidden], self._oldest)
            ranks[hidden], numbers[hidden] = exact_ranks, exact_numbers
        return ranks, numbers

    def _candidates(self, query: np.ndarray, count: int, fetch: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Up to ``count`` rows a query that FAISS finds, as in ``_nearest``; where gone rows left fewer."""
        fetch = min(fetch or (2 * count if self._oldest > self._first else count), self._taken - self._first)
        with _threads():
            distances, numbers = map(torch.from_numpy, self._faiss.search(query, fetch))
        ranks = self._to_ranks(distances)
        if not self._takes_numbers:
            numbers[numbers >= 0] += self._first
        more = numbers[:, -1] >= 0
        hidden = ((numbers >= 0) & (numbers < self._oldest)).any(dim=1)
        missing = (numbers < self._oldest) | ranks.isnan()
        ranks, numbers = _best(ranks.masked_fill(missing, torch.nan), numbers.masked_fill(missing, -1), count)
        hidden &= numbers[:, -1] < 0
        again = (hidden & more).nonzero()[:, 0]
        if len(again) and fetch < self._taken - self._first:
            ranks[again], numbers[again], hidden[again] = self._candidates(query[again.numpy()], count, 2 * fetch)
        return ranks, numbers, hidden

    def _exact_ranks(self, query: Tensor, numbers: Tensor) -> Tensor:
        """What the metric compares, of each query ``[N, D]`` and rows by sequence number ``[N, n]``; NaN at −1."""
        ranks = torch.full(numbers.shape, torch.nan, dtype=torch.float64)
        block = max(1, _EXACT_VALUES // self.dim)
        for piece, slots, rows in self._by_piece(numbers):
            for at in range(0, len(rows), block):
                here = slots[at : at + block]
                asked = query[here // numbers.shape[1]]
                ranks.view(-1)[here] = metric_values(asked, piece.rows[rows[at : at + block]], self.metric)
        return -ranks if self.metric == "ip" else ranks

    def _to_faiss(self, rows: Tensor) -> np.ndarray:
        """Rows as FAISS takes them: in place where they are float32 and contiguous; of length 1 for "cosine"."""
        rows = rows.detach()
        if self.metric == "cosine":
            length = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64)
            rows = rows / length.masked_fill(length == 0, 1.0)
        return rows.float().contiguous().numpy()

    def _to_ranks(self, distances: Tensor) -> Tensor:
        """What FAISS compares as what the metric does, smallest first. Rounding leaves no distance below 0."""
        if self.metric == "ip":
            return -distances.double()
        if self.metric == "cosine":
            return (1.0 - distances.double()).clamp(0.0, 2.0)
        return distances.double().clamp(min=0.0)

    # --- changing ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def train(self, keys: Tensor | None = None) -> None:
        """Train FAISS now, also if it was before, and give it all rows of the index anew.

        Args:
            keys: ``[n, D]`` rows like those to come; a random sample is taken of what is more than 256 for each
                centroid. Default: the rows of the index, as when it trains by itself.

        Does nothing where the factory needs no training.

        Raises:
            TypeError, ValueError: keys are not what ``add`` takes; there are no rows.
            RuntimeError: FAISS cannot train on them, as on fewer rows than centroids; it says why.
        """
        if keys is not None:
            self._layout.check_rows("keys", keys, "[n, D]")
            self._layout.check_finite("keys", keys)
        if (len(self) if keys is None else len(keys)) == 0:
            raise ValueError("train: expected rows, got none; add or pass some")
        if self.training_rows == 0:
            return
        with self._all_or_none():
            self._train(keys)

    def _train(self, keys: Tensor | None = None) -> None:
        there = len(self) if keys is None else len(keys)
        chosen = torch.randperm(there, generator=torch.Generator().manual_seed(0))[: self._most_training_rows]
        chosen = chosen.sort().values
        if keys is None:
            self._check_parts()
        sample = self._keys(chosen + self._oldest) if keys is None else keys[chosen]
        trained = self._placed(self._built_on_cpu())
        with _threads(), _said_by_faiss(f"train: {self.factory!r} on {len(sample)} rows"):
            trained.train(self._to_faiss(sample))
        self._apply_settings(trained)
        self._faiss, self._taken, self._training = trained, 0, uuid.uuid4().hex

    def _follow(self) -> None:
        """Give FAISS the rows that it lacks, and have it forget those that are gone, where they are many."""
        try:
            if not self._faiss.is_trained and len(self) >= self.training_rows:
                self._train()
            if self._faiss.is_trained:
                self._forget_gone()
                self._take_rows()
        except BaseException:
            self._faiss.reset()
            self._taken = 0
            raise

    def _forget_gone(self) -> None:
        faiss = import_faiss()
        gone, live = self._oldest - self._first, self._taken - self._oldest
        if self._taken == 0 or gone <= live / 2:
            return
        if self._drops_rows and self._gpu is None and live > 0:
            with _threads():
                self._faiss.remove_ids(faiss.IDSelectorRange(self._first, self._oldest))
            self._first = self._oldest
        else:
            self._faiss.reset()
            self._taken = 0

    def _take_rows(self) -> None:
        if self._taken == 0:
            self._first = self._taken = self._oldest
        if self._taken == self._tail.end:
            return
        for piece in self._in_order():
            if piece.end <= self._taken:
                continue
            if piece.part is not None:
                piece.part.check()
            rows = self._to_faiss(piece.rows[self._taken - piece.start :])
            with _threads(), _said_by_faiss(f"add: {self.factory!r}"):
                if self._takes_numbers:
                    self._faiss.add_with_ids(rows, np.arange(self._taken, self._taken + len(rows)))
                else:
                    self._faiss.add(rows)
            self._taken += len(rows)
            if piece.part is not None:
                piece.part.let_go()

    # --- files ------------------------------------------------------------------------------------------------------

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        mmap: bool = True,
        faiss_device: str | torch.device = "cpu",
        verify: str = "first_use",
    ) -> FaissIndex:
        """Open a saved index; adding to it goes on where it was.

        Args:
            path: the folder.
            mmap: leave rows on disk. False: read them into RAM. What FAISS holds is in RAM in both.
            faiss_device: where FAISS searches, as of the index.
            verify: when the content of rows is compared with its checksums, as in ``ExactIndex.open``. FAISS's parts
                are when they are read, here.

        ``save`` writes what FAISS holds, in parts of 64 MiB, where that changed by more than a quarter: else what
        was written serves, and opening gives FAISS the rows that came since.

        Raises:
            IndexFileError: the manifest or a part is missing, torn, altered, or of a later version, of this library or
                of FAISS. It is named.
            ModuleNotFoundError, ValueError: as of the index.
        """
        return cls._open(path, verify, mmap=mmap, faiss_device=faiss_device)

    def _saved_arguments(self) -> dict[str, Any]:
        own = {
            "factory": self.factory,
            "settings": self.settings,
            "rerank": self.rerank,
            "training_rows": self.training_rows or None,
        }
        return super()._saved_arguments() | own

    @classmethod
    def _arguments(cls, manifest: dict[str, Any]) -> dict[str, Any]:
        own = ("factory", "settings", "rerank", "training_rows")
        return super()._arguments(manifest) | {name: manifest[name] for name in own}

    def _write_beside(self, folder: Folder, written: list[PartRecord]) -> list[PartRecord]:
        if not self._faiss.is_trained or (written and self._serve(written[0].about)):
            return written
        about = {"role": "faiss", "first": self._first, "taken": self._taken, "training": self._training}
        about["version"] = import_faiss().__version__
        records: list[PartRecord] = []

        def write(block: bytearray) -> None:
            tensors = {"faiss": torch.frombuffer(block, dtype=torch.uint8)}
            records.append(folder.write_part(tensors, about))

        try:
            _write_faiss(self._on_cpu(), write)
        except BaseException:
            for record in records:
                folder.discard(record)
            raise
        return records

    def _serve(self, about: dict[str, Any]) -> bool:
        """Whether parts that were written are near enough to what FAISS holds now."""
        gone = max(0, self._oldest - about["first"])
        held = max(0, about["taken"] - max(about["first"], self._oldest))
        lacks = self._taken - about["taken"]
        return about["training"] == self._training and 4 * lacks <= held and gone <= held

    def _opened(self, beside: list[Part]) -> None:
        if beside:
            about = beside[0].record.about
            for part in beside:
                part.check()
            what = f"{beside[0].path} and the {len(beside) - 1} after it, written by FAISS {about['version']}"
            with _said_by_faiss(what, IndexFileError):
                self._faiss = self._placed(_read_faiss(beside))
            self._apply_settings(self._faiss)
            self._first, self._taken, self._training = about["first"], about["taken"], about["training"]
        self._follow()

    # --- FAISS ------------------------------------------------------------------------------------------------------

    def _built_on_cpu(self) -> Any:
        faiss = import_faiss()
        metric = faiss.METRIC_L2 if self.metric == "l2" else faiss.METRIC_INNER_PRODUCT
        with _said_by_faiss(
            f"factory: expected what FAISS can build for dim {self.dim}, got {self.factory!r}", ValueError
        ):
            return faiss.index_factory(self.dim, self.factory, metric)

    def _placed(self, index: Any) -> Any:
        """An index on the CPU, moved to where it searches."""
        if self._gpu is None:
            return index
        with _said_by_faiss(f"faiss_device: {self.factory!r} on {self.faiss_device}", ValueError):
            return import_faiss().index_cpu_to_gpu(self._gpu, self.faiss_device.index or 0, index)

    def _on_cpu(self) -> Any:
        return self._faiss if self._gpu is None else import_faiss().index_gpu_to_cpu(self._faiss)

    def _apply_settings(self, index: Any) -> None:
        faiss = import_faiss()
        space = faiss.ParameterSpace() if self._gpu is None else faiss.GpuParameterSpace()
        for name, value in self.settings.items():
            with _said_by_faiss(f"settings: {name}={value}", ValueError):
                space.set_index_parameter(index, name, value)

    def _setting_names(self) -> list[str]:
        """The settings that an index of this factory takes."""
        space, index, names = import_faiss().ParameterSpace(), self._built_on_cpu(), []
        for name in _SETTINGS:
            with contextlib.suppress(RuntimeError):
                space.set_index_parameter(index, name, 1)
                names.append(name)
        return names


def import_faiss() -> Any:
    """The module faiss, of whichever package brings it."""
    try:
        return importlib.import_module("faiss")
    except ImportError as error:
        raise ModuleNotFoundError(
            "FaissIndex needs the package faiss-cpu, or faiss-gpu for a GPU: pip install 'memad_fast[faiss]'",
            name="faiss",
        ) from error


def _gpu_resources(faiss: Any, device: torch.device) -> Any:
    if device.type != "cuda":
        raise ValueError(f"faiss_device: expected cpu or cuda, got {device}")
    if not torch.cuda.is_available():
        raise ValueError(f"faiss_device: {device} was asked for, and torch finds no CUDA device")
    if not hasattr(faiss, "StandardGpuResources"):
        raise ModuleNotFoundError(
            f"faiss_device: {device} was asked for, and this is the package faiss-cpu; install faiss-gpu in its place",
            name="faiss",
        )
    return faiss.StandardGpuResources()


@contextlib.contextmanager
def _threads() -> Iterator[None]:
    """FAISS uses as many threads as torch does."""
    faiss = import_faiss()
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(torch.get_num_threads())
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


@contextlib.contextmanager
def _said_by_faiss(what: str, error: type[Exception] = RuntimeError) -> Iterator[None]:
    """An error of FAISS, without the place in its code but with what was being done."""
    try:
        yield
    except RuntimeError as raised:
        said = re.sub(r"^Error in .*? at \S+:\d+: ", "", str(raised), flags=re.DOTALL)
        raise error(f"{what}; FAISS says: {said}") from raised


def _core(faiss: Any, index: Any) -> Any:
    """The index behind transformations of its rows."""
    index = faiss.downcast_index(index)
    while isinstance(index, faiss.IndexPreTransform):
        index = faiss.downcast_index(index.index)
    return index


def _centroids(faiss: Any, index: Any) -> int:
    """The most centroids that training looks for at once; 256, those of a byte, where it is not known."""
    index = faiss.downcast_index(index)
    counts = []
    if isinstance(index, faiss.IndexIVF):
        lists = faiss.downcast_index(index.quantizer)
        counts.append(lists.pq.ksub if isinstance(lists, faiss.MultiIndexQuantizer) else index.nlist)
    if hasattr(index, "pq"):
        counts.append(index.pq.ksub)
    if hasattr(index, "chain"):  # of transformations; that of OPQ looks for 256
        transforms = (faiss.downcast_VectorTransform(index.chain.at(i)) for i in range(index.chain.size()))
        counts += [256 for transform in transforms if isinstance(transform, faiss.OPQMatrix)]
    inside = (getattr(index, name) for name in ("index", "base_index", "storage") if hasattr(index, name))
    counts += [_centroids(faiss, other) for other in inside]
    return max(counts, default=256)


def _best(ranks: Tensor, numbers: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of each query's candidates, as ``best_first`` orders them."""
    order = best_first(ranks, numbers)[:, :k]
    return ranks.gather(1, order), numbers.gather(1, order)


# --- FAISS's own files, in blocks: FAISS would hold all of them in memory a second time -------------------------------


def _write_faiss(index: Any, write: Callable[[bytearray], None]) -> None:
    faiss = import_faiss()
    block, raised = bytearray(), None

    def take(data: bytes) -> None:
        nonlocal block, raised
        if raised is not None:
            return  # FAISS does not stop
        block += data
        if len(block) >= _PART_BYTES:
            full, block = block, bytearray()
            try:
                write(full)
            except BaseException as error:  # would not pass through FAISS
                raised = error

    faiss.write_index(index, faiss.PyCallbackIOWriter(take))
    if raised is not None:
        raise raised
    if block:
        write(block)


def _read_faiss(parts: list[Part]) -> Any:
    faiss = import_faiss()
    blocks = [tensor.numpy() for part in parts if (tensor := part.tensor("faiss")) is not None]
    at = 0

    def give(size: int) -> bytes:
        nonlocal at
        while blocks and at == len(blocks[0]):
            at = 0
            del blocks[0]
        if not blocks:
            return b""
        data = blocks[0][at : at + size].tobytes()
        at += len(data)
        return data

    return faiss.read_index(faiss.PyCallbackIOReader(give))
