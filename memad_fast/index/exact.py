"""ExactIndex: a memory of any size, searched exactly: the screen of ``nearest_keys`` over chunks.

                     in RAM                                on disk, if the index has a folder
    full chunks      int8 codes and bounds, D + 24 B/row   original rows, read for what codes cannot decide; values, ids
    tail             codes, rows, values, ids              what was saved

A search goes over the chunks with ``nearest_keys_merge_``: what was found in one prunes the next, and what is left of a
chunk is computed in float64 from its original rows. So results are those of brute force in float64 over all rows in
order of age, ties to the oldest (csrc/cpu/README_nearest_keys.md has the proof).

Rows have sequence numbers in order of age. A ring is nothing more: the newest row is appended, the oldest forgotten by
moving the number where the live rows begin, and a chunk with no live row is dropped.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from memad_fast._arguments import METRICS, check_choice
from memad_fast._backend import backends
from memad_fast.index.base import Found, Index, IndexStats
from memad_fast.index.chunks import Chunk, Layout, RowIds, Tail, some
from memad_fast.index.files import Folder, IndexFileError, Part, PartRecord, give_back_freed_memory
from memad_fast.index.ids import Ids, IdTable
from memad_fast.index.sizes import Estimate, check_count, chunk_rows_for, parse_bytes
from memad_fast.ops.nearest_keys_merge_ import nearest_keys_merge_
from memad_fast.ops.prepare_keys import PreparedKeys, prepare_keys

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
VERIFY = ("first_use", "now", "sizes")

_SEARCH_BYTES = 1 << 28  # of a search beside its results, without a budget
_ID_TABLE_BYTES = 16  # a row with an id of its own


class Rows(NamedTuple):
    """Rows of an index; unpacks as (keys, ids, values)."""

    keys: Tensor  # [n, D]
    ids: Tensor  # [n] int64
    values: Tensor | None  # [n, V]


@dataclass
class _Stored:
    """Which parts hold which rows: of each chunk, by its start, and of the tail (start, rows, part), oldest first."""

    chunks: dict[int, PartRecord] = field(default_factory=dict)
    tail: list[tuple[int, int, PartRecord]] = field(default_factory=list)


class ExactIndex(Index):
    """A memory that finds the nearest rows exactly, in a quarter of the RAM that float32 rows take.

    Args:
        dim: D, the length of a row; at least 1.
        metric: "l2" (squared Euclidean distance), "cosine" (1 − cosine) or "ip" (inner product), as ``nearest_keys``.
        dtype: of the rows: float32, float16 or bfloat16.
        device: where the rows are, and queries come from.
        values_dim: V, if each row has values ``[V]``; None: no values.
        values_dtype: of the values.
        capacity: rows that there is room for; further ones push out the oldest. None: as many as come.
        chunk_rows: rows that are packed, written and checked as one, a multiple of 64. Default: 64 MiB of rows, at most
            65,536 rows, an eighth of the capacity or of what the budget allows.
        memory_budget: bytes, or "2GB", "512MiB": what the index and a search hold in RAM, results apart. Codes beyond
            it stay on disk and are read by every search. None: all codes are held.
        path: a folder, new or empty, that full chunks are written to as they fill; they count from ``save`` on. None:
            all is in RAM until ``save``.
        mmap: read rows on disk where they lie. False: the rows stay in RAM too; files are then for ``open`` alone.

    A row is added with an id, a unique number of at least 0: given, or counting on from the largest so far. The id of a
    removed row may come again.

    The index is for one thread at a time. On a CPU adding packs the new rows alone (a row is packed three times in all,
    as buffers grow); codes take D + 24 bytes a row, ids of one's own 8 and, once one is looked up, 16 more. On a GPU
    ``device="cuda"`` keeps all on the device; chunks are searched one by one, by ``nearest_keys``, and merged by a
    sort; the newest rows, less than a chunk, are packed again at every search. No GPU has run it yet.

    Files: see ``save`` and ``open``. Only one index writes to a folder: the first change takes its lock, which ends
    with the process, with ``close``, or with the index. Searching needs no lock.

    Raises:
        TypeError, ValueError: an argument is not what is said above.
        IndexFileError: there is an index in the folder: open it.
        FolderInUseError: another index writes to the folder.
        OSError: the folder cannot be written.

    Example:
        >>> import torch
        >>> from memad_fast.index import ExactIndex
        >>> index = ExactIndex(2, values_dim=1, capacity=3)
        >>> index.add(torch.tensor([[0.0, 0.0], [3.0, 4.0]]), values=torch.tensor([[10.0], [20.0]]))
        tensor([0, 1])
        >>> distances, ids, values = index.search(torch.tensor([[3.0, 3.0]]), k=1)
        >>> distances, ids, values
        (tensor([[1.]]), tensor([[1]]), tensor([[[20.]]]))
        >>> _ = index.add(torch.ones(2, 2), values=torch.zeros(2, 1))  # the oldest row goes
        >>> index.search(torch.zeros(1, 2), k=3).ids
        tensor([[2, 3, 1]])
    """

    def __init__(
        self,
        dim: int,
        *,
        metric: str = "l2",
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        values_dim: int | None = None,
        values_dtype: torch.dtype = torch.float32,
        capacity: int | None = None,
        chunk_rows: int | None = None,
        memory_budget: int | str | None = None,
        path: str | os.PathLike[str] | None = None,
        mmap: bool = True,
    ) -> None:
        check_count("dim", dim)
        check_choice("metric", metric, METRICS)
        if dtype not in DTYPES:
            raise TypeError(f"dtype: expected {', '.join(map(str, DTYPES))}, got {dtype}")
        for name, count in (("values_dim", values_dim), ("capacity", capacity), ("chunk_rows", chunk_rows)):
            if count is not None:
                check_count(name, count)
        device = torch.device(device)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device: {device} was asked for, and torch finds no CUDA device")
        if path is not None and mmap and device.type != "cpu":
            raise ValueError(f"mmap: rows on {device} cannot be read where they lie on disk; pass mmap=False")
        self.dim = dim
        self.metric = metric
        self.dtype = dtype
        self.device = device
        self.values_dim = values_dim
        self.values_dtype = values_dtype
        self.capacity = capacity
        self.memory_budget = None if memory_budget is None else parse_bytes(memory_budget)
        row_bytes = dim * dtype.itemsize + (values_dim or 0) * values_dtype.itemsize
        chunk_rows = chunk_rows_for(chunk_rows, row_bytes, capacity, self.memory_budget)
        self._layout = Layout(dim, metric, dtype, values_dim, values_dtype, device, chunk_rows)
        self._chunks: list[Chunk] = []
        self._tail = Tail(self._layout, 0)
        self._oldest = 0  # sequence number of the oldest row
        self._next_id = 0
        self._id_table: IdTable | None = None  # made when an id is first looked up
        self._mmap = mmap
        self._folder: Folder | None = None
        self._stored = _Stored()
        if path is not None:
            self._folder = Folder(path)
            self._folder.lock()

    # --- what there is ----------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self._tail.end - self._oldest

    @property
    def path(self) -> Path | None:
        """The folder that ``save()`` writes to; None where there is none yet."""
        return None if self._folder is None else self._folder.path

    @property
    def next_id(self) -> int:
        """The id that the next row gets if none is given: one more than the largest ever added."""
        return self._next_id

    def __repr__(self) -> str:
        return f"ExactIndex({len(self)} x {self.dim}, {self._layout.dtype}, metric={self.metric!r})"

    def stats(self) -> IndexStats:
        """Sizes in rows and bytes. Codes on a file's pages count as RAM too, as far as the budget holds them."""
        codes = sum(chunk.keys.nbytes for chunk in self._chunks if chunk.part is not None)
        own = sum(chunk.held_bytes for chunk in self._chunks if chunk.part is not None)
        return IndexStats(
            rows=len(self),
            dim=self.dim,
            metric=self.metric,
            kind="exact",
            ram_bytes=self._held_bytes() + min(codes - own, self._codes_budget()),
            disk_bytes=0 if self._folder is None else self._folder.disk_bytes(),
            capacity=self.capacity,
        )

    @staticmethod
    def estimate(
        rows: int,
        dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        values_dim: int | None = None,
        values_dtype: torch.dtype = torch.float32,
        own_ids: bool = False,
        capacity: int | None = None,
        chunk_rows: int | None = None,
        on_disk: bool = True,
    ) -> Estimate:
        """What an index on a CPU will take, before anything is built.

        Args:
            rows: how many rows will be there.
            dim: as of the index.
            dtype: as of the index.
            values_dim: as of the index.
            values_dtype: as of the index.
            own_ids: whether ids are given, rather than counting on.
            capacity: as of the index; ``rows`` is then at most this.
            chunk_rows: as of the index.
            on_disk: whether the index has a folder (``path``, or ``open``) and leaves its rows there.

        Returns:
            ``Estimate(ram_bytes, disk_bytes)``: what the index holds between searches, and its files after ``save``.

        Example:
            >>> from memad_fast.index import ExactIndex
            >>> estimate = ExactIndex.estimate(10_000_000, 512)
            >>> f"{estimate.ram_bytes / 1e9:.1f} GB of RAM, {estimate.disk_bytes / 1e9:.1f} GB on disk"
            '5.4 GB of RAM, 25.8 GB on disk'
        """
        row_bytes = dim * dtype.itemsize + (values_dim or 0) * values_dtype.itemsize
        size = chunk_rows_for(chunk_rows, row_bytes, capacity, None)
        layout = Layout(dim, "l2", dtype, values_dim, values_dtype, torch.device("cpu"), size)
        full, left = divmod(rows, size)
        room = layout.tail_rows(left) if left else 0
        each = row_bytes + (8 if own_ids else 0)
        codes = full * layout.codes_bytes(size)
        tail = room * each + (layout.codes_bytes(room) if left else 0)
        table = _ID_TABLE_BYTES * rows if own_ids else 0
        header = 512 + 1024  # of a part, and its lines in the manifest
        return Estimate(
            ram_bytes=codes + tail + table + (0 if on_disk else full * size * each),
            disk_bytes=codes + rows * each + (full + bool(left)) * header,
        )

    def rows(self, ids: Tensor | Sequence[int]) -> Rows:
        """The rows with these ids ``[n]``, in this order: keys ``[n, D]``, ids ``[n]`` and values ``[n, V]``.

        Raises:
            TypeError: not integers.
            ValueError: an id was never added, or its row was removed; some are named.
            IndexFileError: a part of the index on disk is torn or altered.
        """
        wanted = as_ids(ids)
        numbers = self._table().find(wanted, self._oldest)
        if (missing := wanted[numbers < 0]).size:
            raise ValueError(f"ids: {some(missing)} not in the index: never added, or removed since")
        self._check_parts()
        found = torch.from_numpy(numbers).to(self._layout.device)
        keys = torch.empty(len(found), self.dim, dtype=self._layout.dtype, device=found.device)
        values = self._layout.new_values(len(found))
        for piece, slots, rows in self._by_piece(found):
            keys[slots] = piece.rows[rows]
            if values is not None:
                values[slots] = piece.values[rows]  # type: ignore[index]
        return Rows(keys, torch.from_numpy(wanted).to(found.device), values)

    def pieces(self) -> Iterator[Rows]:
        """All rows, oldest first, a chunk at a time; views that are good until the index changes.

        Raises:
            IndexFileError: a part of the index on disk is torn or altered.
        """
        for piece in self._in_order():
            if isinstance(piece, Chunk) and piece.part is not None:
                piece.part.check()
            live = torch.arange(max(0, self._oldest - piece.start), len(piece), device=self._layout.device)
            if len(live):
                here = slice(len(piece) - len(live), len(piece))
                yield Rows(piece.rows[here], piece.ids.of(live), None if piece.values is None else piece.values[here])

    def _in_order(self) -> list[Chunk | Tail]:
        return [*self._chunks, self._tail]

    # --- searching --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def search(self, query: Tensor, k: int = 1) -> Found:
        """The k nearest rows of each query, exactly.

        Args:
            query: ``[N, D]``, dtype and device of the index. One with a NaN or an infinity finds nothing.
            k: how many; at least 1.

        Returns:
            ``Found(distances, ids, values)``: ``distances`` ``[N, k]`` float32, "l2" and "cosine" smallest first, "ip"
            largest first; ``ids`` ``[N, k]`` int64; ``values`` ``[N, k, V]``, or None in an index without. Equal to
            brute force in float64, ties to the oldest row.

            With k larger than the index the last slots are −1, NaN and 0, as in FAISS: a memory that fills, as at the
            start of a line, is no error.

        Gradients: none.

        Cost: that of ``nearest_keys`` over all codes, and a few original rows of each query. Beside the results 16·k
        bytes a query and a few MiB a thread; queries that would take more than the budget allows are searched in
        blocks, each over all codes. The first search of what was opened reads all parts once, to check them (``open``).

        Raises:
            TypeError, ValueError: query or k is not what is said above; the index is empty.
            IndexFileError: a part of the index on disk is torn or altered.
        """
        self._layout.check_rows("query", query, "[N, D]")
        check_count("k", k)
        if len(self) == 0:
            raise ValueError("search: the index is empty; add rows first")
        self._check_parts()
        block = max(1, self._search_bytes() // (64 * k))
        found = [self._found(*self._nearest(part, k)) for part in query.detach().split(block)]
        if len(found) == 1:
            return found[0]
        distances, ids, values = zip(*found, strict=True)
        return Found(torch.cat(distances), torch.cat(ids), None if values[0] is None else torch.cat(values))

    def _nearest(self, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k nearest of each query: sequence numbers, and what the metric compares: float64, smallest first."""
        shape, device = (len(query), k), self._layout.device
        ranks = torch.full(shape, torch.nan, dtype=torch.float64, device=device)
        numbers = torch.full(shape, -1, dtype=torch.int64, device=device)
        budget = self._codes_budget()
        for piece in self._in_order():
            first, last = max(0, self._oldest - piece.start), len(piece)
            if first >= last:
                continue
            where = {"first": first, "last": last, "offset": piece.start}
            nearest_keys_merge_(ranks, numbers, query, piece.searched(), **where, metric=self.metric)
            if isinstance(piece, Chunk) and piece.part is not None:  # else ever more of the rows would stay in memory
                budget -= piece.keys.nbytes
                piece.part.let_go(keep=() if budget < 0 else ("packed",))
        return ranks, numbers

    def _found(self, ranks: Tensor, numbers: Tensor) -> Found:
        """What ``_nearest`` found, as users see it."""
        ids = torch.full_like(numbers, -1)
        values = self._layout.new_values(*numbers.shape)
        for piece, slots, rows in self._by_piece(numbers):
            ids[slots] = piece.ids.of(rows)
            if values is not None:
                values[slots] = piece.values[rows]  # type: ignore[index]
        return Found(as_distances(ranks, self.metric), ids, values)

    def _by_piece(self, numbers: Tensor) -> Iterator[tuple[Chunk | Tail, tuple[Tensor, ...], Tensor]]:
        """Sequence numbers sorted by where they are: each piece, the slots of ``numbers`` with it, its rows there."""
        pieces = self._in_order()
        starts = torch.tensor([piece.start for piece in pieces], device=numbers.device)
        which = torch.bucketize(numbers, starts, right=True) - 1
        which = which.masked_fill(numbers < 0, -1)
        for at in which.unique().tolist():
            if at >= 0:
                slots = (which == at).nonzero(as_tuple=True)
                yield pieces[at], slots, numbers[slots] - pieces[at].start

    # --- changing ---------------------------------------------------------------------------------------------------

    def add(self, keys: Tensor, values: Tensor | None = None, ids: Tensor | Sequence[int] | None = None) -> Tensor:
        """Add rows as the newest, all or none of them.

        Args:
            keys: ``[n, D]`` in the dtype and on the device of the index, finite.
            values: ``[n, V]`` in their dtype, in an index with values.
            ids: n different integers of at least 0 that no row has. Default: counting on from the largest ever added.

        Returns:
            The ids ``[n]`` int64.

        Cost: a copy and a packing of the new rows; in an index with a folder the writing of every chunk that fills.

        Raises:
            TypeError: a wrong type or dtype.
            ValueError: a wrong shape or device; a NaN or an infinity (the rows are named); ids that are negative, or
                not unique (some are named); rows that the memory budget has no room for.
            OSError: a chunk could not be written, as on a full disk.
            FolderInUseError, IndexFileError: the folder has another writer, or was changed since it was opened.
        """
        self._check_rows(keys, values)
        with self._all_or_none():
            return self._add(keys, values, self._next_id if ids is None else as_ids(ids))

    def remove_oldest(self, n: int) -> None:
        """Remove the n oldest rows. Costs nothing: rows are forgotten, chunks without any dropped.

        Raises:
            TypeError, ValueError: n is not an integer from 0 to the number of rows.
            OSError, FolderInUseError, IndexFileError: as ``add``.
        """
        if isinstance(n, bool) or not isinstance(n, int):
            raise TypeError(f"n: expected an int, got {type(n).__name__}")
        if not 0 <= n <= len(self):
            raise ValueError(f"n: expected 0 to {len(self)} (the number of rows), got {n}")
        with self._all_or_none():
            self._forget_before(self._oldest + n)

    def merge(self, others: Sequence[Index], *, keep_ids: bool = True) -> None:
        """Add the rows of other indexes, in their order and oldest first, with their values: all or none.

        Args:
            others: ``ExactIndex`` of the same dim, metric, dtype, device and values.
            keep_ids: keep their ids, which must differ; False: give new ones, counting on.

        Raises:
            TypeError, ValueError: an index of another kind, or this one; ids that are not unique (some are named).
            OSError, FolderInUseError, IndexFileError: as ``add``.
        """
        for other in others:
            if not isinstance(other, ExactIndex):
                raise TypeError(f"others: expected ExactIndex, got {type(other).__name__}")
            self._check_alike(other)
        with self._all_or_none():
            for other in others:
                assert isinstance(other, ExactIndex)
                for keys, ids, values in other.pieces():
                    self._add(keys, values, ids.cpu().numpy() if keep_ids else self._next_id)

    def _add(self, keys: Tensor, values: Tensor | None, ids: Ids | int) -> Tensor:
        """``ids``: of each row, or the first of ids that count on, larger than any so far."""
        count, first_row = len(keys), self._tail.end
        if isinstance(ids, int):
            if ids + count > 2**63 - 1:
                raise ValueError("ids: none is left above the largest; pass ids")
            if self._id_table is not None:
                self._id_table.add_range(ids, first_row, count, self._oldest)
            self._next_id = ids + count
            given = torch.arange(ids, ids + count, device=self._layout.device)
        else:
            self._check_new(ids, count)
            self._table().add(ids, first_row, self._oldest)
            self._next_id = max(self._next_id, int(ids.max(initial=-1)) + 1)
            given = torch.from_numpy(ids).to(self._layout.device)
        at = 0
        while at < count:
            rest = None if values is None else values[at:].detach()
            at += self._tail.append(keys[at:].detach(), ids + at if isinstance(ids, int) else given[at:], rest)
            self._forget_before(self._tail.end - self.capacity if self.capacity is not None else 0)
            if self._tail.is_full:
                self._finish_tail()
            self._check_budget()
        self._tail.pack()
        self._check_budget()
        return given

    def _finish_tail(self) -> None:
        chunk = self._tail.to_chunk()
        if self._folder is not None and self._mmap:
            record = self._write_chunk(self._folder, chunk)
            self._stored.chunks[chunk.start] = record
            chunk = self._open_chunk(Part(self._folder.path, record, checked=True))
        self._stored.tail = []
        self._chunks.append(chunk)
        self._tail = Tail(self._layout, chunk.end)
        if chunk.part is not None:
            give_back_freed_memory()

    def _forget_before(self, oldest: int) -> None:
        """Rows before this sequence number are no more."""
        self._oldest = max(self._oldest, oldest)
        self._chunks = [chunk for chunk in self._chunks if chunk.end > self._oldest]
        if self._oldest == self._tail.end and len(self._tail):
            self._tail = Tail(self._layout, self._oldest)
        self._stored.tail = [part for part in self._stored.tail if part[0] + part[1] > self._oldest]

    @contextlib.contextmanager
    def _all_or_none(self) -> Iterator[None]:
        """A change of the index: taken back if it raises."""
        if self._folder is not None:
            self._folder.lock()
        tail, count = self._tail, self._tail.count
        chunks, stored = list(self._chunks), _Stored(dict(self._stored.chunks), list(self._stored.tail))
        oldest, next_id = self._oldest, self._next_id
        try:
            yield
        except BaseException:
            tail.shrink_to(count)
            tail.pack()
            self._tail, self._chunks, self._oldest, self._next_id = tail, chunks, oldest, next_id
            self._id_table = None
            written, self._stored = self._stored, stored
            self._discard(written.chunks, stored.chunks)
            raise
        live = {chunk.start for chunk in self._chunks}
        kept = {start: part for start, part in self._stored.chunks.items() if start in live}
        self._discard(self._stored.chunks, kept)
        self._stored.chunks = kept

    def _discard(self, parts: dict[int, PartRecord], kept: dict[int, PartRecord]) -> None:
        for start in parts.keys() - kept.keys():
            assert self._folder is not None
            self._folder.discard(parts[start])

    # --- files ------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str] | None = None) -> None:
        """Write what changed since the last ``save``; when it returns, all rows survive a crash.

        Args:
            path: a folder; default: the index's own. An index without one makes this its own: later saves write new
                rows only. Another folder than its own gets a copy; an index in there is replaced.

        A crash at any moment leaves the state that was saved last. Cost: one write of the new rows, their values and
        ids, and of the codes of full chunks. Parts of an unfinished chunk are joined, so that there are log₂ of them
        and a row is written as many times at most, and once more when its chunk is full.

        Raises:
            ValueError: no path, and the index has no folder.
            FolderInUseError: another index writes to the folder.
            IndexFileError: the folder was changed since it was opened, or holds a manifest that cannot be read.
            OSError: the folder cannot be written, or the disk is full. What was saved last stands, and the index in
                memory stays whole: save again, or elsewhere.
        """
        if path is None and self._folder is None:
            raise ValueError("path: the index has no folder yet; say where to save it")
        folder = self._folder_at(path)
        if folder is not self._folder and folder.exists:
            folder.read()
        with self._writing(folder) as (settings, parts):
            folder.commit(settings, parts)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        mmap: bool = True,
        device: str | torch.device = "cpu",
        memory_budget: int | str | None = None,
        verify: str = "first_use",
    ) -> ExactIndex:
        """Open a saved index; adding to it goes on where it was.

        Args:
            path: the folder.
            mmap: leave rows on disk, and codes on the file's pages. False: read all into RAM.
            device: where to put the rows; other than the CPU with ``mmap=False`` only.
            memory_budget: as of the index.
            verify: when the content of parts is compared with its checksums: "first_use": by the first search, which
                reads all files once, 1 to 2 GB a second and thread where they are in the system's cache; "now"; or
                "sizes": never, but sizes, for files larger than one wants to read. ``verify()`` does it at any time.

        Opening costs a look at each part. Rows since the last full chunk are read, checked and packed; with
        ``mmap=False`` all parts are.

        Raises:
            IndexFileError: the manifest or a part is missing, torn, altered, or of a later version. It is named.
            ValueError: an argument is not what is said above.
        """
        check_choice("verify", verify, VERIFY)
        folder = Folder(path)
        while True:
            manifest = folder.read()
            try:
                index = cls._from(folder, manifest, mmap, torch.device(device), memory_budget, verify == "sizes")
            except IndexFileError:
                if folder.read() == manifest:
                    raise
                continue  # a writer replaced the manifest, and deleted a part, in between
            if verify == "now":
                index.verify()
            if "shard" in manifest:
                folder.close("it is a shard, which ShardedIndex changes together with the others; save elsewhere")
            return index

    def verify(self) -> None:
        """Compare every part on disk with its checksum, whether it was before or not.

        Raises:
            IndexFileError: a part is torn or altered. It is named.
        """
        for record in [] if self._folder is None else self._folder.records():
            assert self._folder is not None
            Part(self._folder.path, record).check()

    def close(self) -> None:
        """Let others write to the folder. The index can be searched on, but not changed: open it again for that."""
        if self._folder is not None:
            self._folder.close()

    def _folder_at(self, path: str | os.PathLike[str] | None) -> Folder:
        """The index's own folder, if ``path`` is that or None; another."""
        if self._folder is not None and (path is None or Folder(path).path == self._folder.path):
            return self._folder
        assert path is not None
        return Folder(path)

    @contextlib.contextmanager
    def _writing(self, folder: Folder) -> Iterator[tuple[dict[str, Any], list[PartRecord]]]:
        """Write the parts that a folder lacks; the block makes them and the settings the state of the folder.

        If the index has no folder, this one becomes its own.
        """
        own = folder is self._folder
        stored = self._stored if own else _Stored()
        try:
            folder.lock()
            settings, parts, tail = self._write(folder, stored)
            yield settings, parts
        except BaseException:
            if not own:
                folder.close()
            raise
        stored.tail = tail
        if self._folder is None:
            self._folder, self._stored, self._mmap = folder, stored, False
        elif not own:
            folder.close()

    def _write(
        self, folder: Folder, stored: _Stored
    ) -> tuple[dict[str, Any], list[PartRecord], list[tuple[int, int, PartRecord]]]:
        """The settings and parts that the index is, and those of the tail; writes what is not ``stored``."""
        for chunk in self._chunks:
            if chunk.start not in stored.chunks:
                self._check_parts()
                stored.chunks[chunk.start] = self._write_chunk(folder, chunk)
        tail_parts = self._write_tail(folder, stored.tail)
        layout = self._layout
        settings = {
            "kind": "exact",
            "dim": layout.dim,
            "metric": layout.metric,
            "dtype": _name_of(layout.dtype),
            "values_dim": layout.values_dim,
            "values_dtype": _name_of(layout.values_dtype),
            "capacity": self.capacity,
            "chunk_rows": layout.chunk_rows,
            "rows": len(self),
            "oldest": self._oldest,
            "next": self._tail.end,
            "next_id": self._next_id,
        }
        parts = [stored.chunks[chunk.start] for chunk in self._chunks] + [record for _, _, record in tail_parts]
        return settings, parts, tail_parts

    def _write_chunk(self, folder: Folder, chunk: Chunk) -> PartRecord:
        tensors, about = {"rows": chunk.rows}, {"role": "chunk", "start": chunk.start}
        if chunk.keys.packed is not None and not chunk.keys.packed.is_cuda:
            tensors["packed"] = chunk.keys.packed
            about["codes"] = _codes_version()
        return _write_part(folder, tensors, chunk.ids, chunk.values, about)

    def _write_tail(
        self, folder: Folder, parts: list[tuple[int, int, PartRecord]]
    ) -> list[tuple[int, int, PartRecord]]:
        """The parts of the tail with those of its new rows, which are joined with smaller ones before them."""
        tail = self._tail
        begin = max(self._oldest, parts[-1][0] + parts[-1][1]) if parts else max(self._oldest, tail.start)
        kept = list(parts)
        if begin == tail.end:
            return kept
        while kept and kept[-1][1] <= tail.end - begin:
            begin = kept.pop()[0]
        here = slice(begin - tail.start, tail.count)
        values = None if tail.values is None else tail.values[here]
        listed = tail.ids.listed
        ids = RowIds(tail.ids.first + here.start) if listed is None else RowIds(listed=listed[here])
        about = {"role": "tail", "start": begin, "rows": tail.end - begin}
        record = _write_part(folder, {"rows": tail.rows[here]}, ids, values, about)
        return [*kept, (begin, tail.end - begin, record)]

    def _open_chunk(self, part: Part) -> Chunk:
        """A chunk on a part's pages, or read into memory."""
        rows, packed, ids, values = (part.tensor(name) for name in ("rows", "packed", "ids", "values"))
        assert rows is not None
        device, about = self._layout.device, part.record.about
        if device.type != "cpu" or about.get("codes") != _codes_version():
            packed = None  # the layout is another
        if packed is None or not self._mmap:
            part.check()
        if not self._mmap:
            rows = rows.to(device, copy=True)
            packed, ids, values = (x if x is None else x.to(device, copy=True) for x in (packed, ids, values))
        metric = self.metric
        keys = prepare_keys(rows, metric=metric) if packed is None else PreparedKeys(rows, packed, metric)
        row_ids = RowIds(about["first_id"]) if ids is None else RowIds(listed=ids)
        return Chunk(about["start"], keys, row_ids, values, part if self._mmap else None)

    @classmethod
    def _from(
        cls, folder: Folder, manifest: dict[str, Any], mmap: bool, device: torch.device,
        memory_budget: int | str | None, trust: bool,
    ) -> ExactIndex:  # fmt: skip
        if manifest["kind"] != "exact":
            raise IndexFileError(f"{folder.path}: expected an index of kind 'exact', got {manifest['kind']!r}")
        if mmap and device.type != "cpu":
            raise ValueError(f"mmap: rows on {device} cannot be read where they lie on disk; pass mmap=False")
        index = cls(
            manifest["dim"],
            metric=manifest["metric"],
            dtype=getattr(torch, manifest["dtype"]),
            device=device,
            values_dim=manifest["values_dim"],
            values_dtype=getattr(torch, manifest["values_dtype"]),
            capacity=manifest["capacity"],
            chunk_rows=manifest["chunk_rows"],
            memory_budget=memory_budget,
            mmap=mmap,
        )
        index._folder = folder
        index._next_id = manifest["next_id"]
        for record in folder.records():
            part = Part(folder.path, record, checked=trust)
            about = record.about
            if about["role"] == "chunk":
                index._chunks.append(index._open_chunk(part))
                index._stored.chunks[about["start"]] = record
                index._tail = Tail(index._layout, index._chunks[-1].end)
            elif about["role"] == "tail":
                if not index._stored.tail:
                    index._tail = Tail(index._layout, about["start"])
                part.check()
                rows, ids, values = (part.tensor(name) for name in ("rows", "ids", "values"))
                assert rows is not None
                index._tail.append(rows.to(device), about["first_id"] if ids is None else ids.to(device), values)
                index._stored.tail.append((about["start"], about["rows"], record))
        index._oldest = manifest["oldest"]
        if len(index._tail) == 0 and not index._chunks:
            index._tail = Tail(index._layout, manifest["next"])
        if index._tail.end != manifest["next"]:
            raise IndexFileError(f"{folder.path}: the parts end at row {index._tail.end}, not at {manifest['next']}")
        index._tail.pack()
        return index

    def _check_parts(self) -> None:
        """Check the parts that have not been."""
        parts = [chunk.part for chunk in self._chunks if chunk.part is not None and not chunk.part.checked]
        if parts:
            with ThreadPoolExecutor(max(1, min(torch.get_num_threads(), 16))) as pool:
                list(pool.map(Part.check, parts))

    # --- memory -----------------------------------------------------------------------------------------------------

    def _held_bytes(self) -> int:
        """What is in RAM and nowhere else."""
        table = 0 if self._id_table is None else self._id_table.nbytes
        return sum(chunk.held_bytes for chunk in self._chunks) + self._tail.held_bytes + table

    def _search_bytes(self) -> int:
        return _SEARCH_BYTES if self.memory_budget is None else self.memory_budget // 8

    def _codes_budget(self) -> int:
        """What of the budget is left for codes on files' pages."""
        if self.memory_budget is None:
            return 2**63
        return max(0, self.memory_budget - self._held_bytes() - self._search_bytes())

    def _check_budget(self) -> None:
        if self.memory_budget is None:
            return
        needed = self._held_bytes() + self._search_bytes()
        if needed > self.memory_budget:
            advice = "" if self._folder is not None and self._mmap else "; an index with a path leaves rows on disk"
            raise ValueError(f"memory_budget: {self.memory_budget} bytes, and {needed} are needed{advice}")

    # --- checks -----------------------------------------------------------------------------------------------------

    def _check_rows(self, keys: Tensor, values: Tensor | None) -> None:
        self._layout.check_rows("keys", keys, "[n, D]")
        self._layout.check_finite("keys", keys)
        self._layout.check_values(values, len(keys))

    def _check_alike(self, other: ExactIndex) -> None:
        """The rows of another index can be added to this one."""
        if other is self:
            raise ValueError("others: expected other indexes, got this one itself")
        mine, theirs = (
            (x.dim, x.metric, x.dtype, x.values_dim, x.values_dtype, x.device) for x in (self._layout, other._layout)
        )
        if mine != theirs:
            raise ValueError(
                f"others: expected (dim, metric, dtype, values_dim, values_dtype, device) {mine}, got {theirs}"
            )

    def _check_new(self, ids: Ids, count: int) -> None:
        if len(ids) != count:
            raise ValueError(f"ids: expected {count} like keys, got {len(ids)}")
        if (negative := ids[ids < 0]).size:
            raise ValueError(f"ids: expected at least 0, got {some(negative)}")
        if (largest := ids[ids == 2**63 - 1]).size:
            raise ValueError(f"ids: expected less than 2**63 - 1, got {some(largest)}")
        unique, counts = np.unique(ids, return_counts=True)
        if (twice := unique[counts > 1]).size:
            raise ValueError(f"ids: {some(twice)} given more than once")
        if (known := ids[self._table().find(ids, self._oldest) >= 0]).size:
            raise ValueError(f"ids: {some(known)} in the index already")

    def _table(self) -> IdTable:
        if self._id_table is None:
            self._check_parts()
            table = IdTable()
            for piece in self._in_order():
                first = max(0, self._oldest - piece.start)
                row, count = piece.start + first, len(piece) - first
                if piece.ids.listed is None:
                    table.add_range(piece.ids.first + first, row, count, self._oldest)
                else:
                    listed = piece.ids.listed[first:].cpu().numpy().copy()  # pages may go
                    table.add(listed, row, self._oldest)
            self._id_table = table
        return self._id_table


def _write_part(
    folder: Folder, tensors: dict[str, Tensor], ids: RowIds, values: Tensor | None, about: dict[str, Any]
) -> PartRecord:
    if ids.listed is not None:
        tensors["ids"] = ids.listed
    if values is not None:
        tensors["values"] = values
    return folder.write_part(tensors, about | {"first_id": ids.first})


@functools.cache
def _codes_version() -> str:
    """What the packed form of this version begins with; "" where nothing packs."""
    if not backends()["cpu"].available:
        return ""
    return bytes(torch.ops.memad_fast.prepare_keys(torch.zeros(1, 1), "l2")[:8].tolist()).decode()


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def as_distances(ranks: Tensor, metric: str) -> Tensor:
    """What the metric compares, smallest first, as what users read."""
    return (-ranks if metric == "ip" else ranks).float()


def as_ids(ids: Tensor | Sequence[int]) -> Ids:
    """Ids as users give them, one-dimensional and int64."""
    array = ids.detach().cpu().numpy() if isinstance(ids, Tensor) else np.asarray(ids)
    if array.size == 0:
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise TypeError(f"ids: expected integers [n], got {array.dtype} of shape {array.shape}")
    return array.astype(np.int64)
