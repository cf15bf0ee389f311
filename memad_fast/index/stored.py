"""What indexes that keep their rows have in common: all but how rows are searched.

    ExactIndex ──┐                                    ┌── chunks.py   full chunks and a tail, in RAM or on files' pages
                 ├──► StoredIndex: rows, ids, values ─┼── ids.py      which row has an id
    FaissIndex ──┘                                    └── files.py    a folder with one writer

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
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from memad_fast._arguments import METRICS, check_choice
from memad_fast._backend import backends
from memad_fast.index.base import Found, Index
from memad_fast.index.chunks import Chunk, Layout, RowIds, Tail, some
from memad_fast.index.files import Folder, IndexFileError, Part, PartRecord, give_back_freed_memory
from memad_fast.index.ids import Ids, IdTable
from memad_fast.index.sizes import check_count, chunk_rows_for
from memad_fast.ops.nearest_keys_merge_ import nearest_keys_merge_
from memad_fast.ops.prepare_keys import PreparedKeys

if TYPE_CHECKING:
    from typing_extensions import Self

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
VERIFY = ("first_use", "now", "sizes")


class Rows(NamedTuple):
    """Rows of an index; unpacks as (keys, ids, values)."""

    keys: Tensor  # [n, D]
    ids: Tensor  # [n] int64
    values: Tensor | None  # [n, V]


@dataclass
class Stored:
    """Which parts of a folder hold what."""

    chunks: dict[int, PartRecord] = field(default_factory=dict)  # by the chunk's start
    tail: list[tuple[int, int, PartRecord]] = field(default_factory=list)  # start, rows, part; oldest first
    beside: list[PartRecord] = field(default_factory=list)  # what a kind of index keeps beside rows

    def copy(self) -> Stored:
        """As it is now."""
        return Stored(dict(self.chunks), list(self.tail), list(self.beside))


class StoredIndex(Index):
    """An index that keeps its rows, ids and values.

    A kind of index says how rows are searched (``search``), and what is to be done when rows came or went
    (``_follow``), were opened (``_opened``), are written (``_saved_arguments``, ``_write_beside``) or take more memory
    (``_check_room``).
    """

    kind: ClassVar[str]  # what the manifest calls it

    def __init__(
        self,
        dim: int,
        *,
        metric: str,
        dtype: torch.dtype,
        device: str | torch.device,
        values_dim: int | None,
        values_dtype: torch.dtype,
        capacity: int | None,
        chunk_rows: int | None,
        budget: int | None,
        coded: bool,
        mmap: bool,
    ) -> None:
        """As ``ExactIndex``; ``coded``: whether chunks are packed for exact searches."""
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
        self.dim = dim
        self.metric = metric
        self.dtype = dtype
        self.device = device
        self.values_dim = values_dim
        self.values_dtype = values_dtype
        self.capacity = capacity
        row_bytes = dim * dtype.itemsize + (values_dim or 0) * values_dtype.itemsize
        chunk_rows = chunk_rows_for(chunk_rows, row_bytes, capacity, budget)
        self._layout = Layout(dim, metric, dtype, values_dim, values_dtype, device, chunk_rows, coded)
        self._chunks: list[Chunk] = []
        self._tail = Tail(self._layout, 0)
        self._oldest = 0  # sequence number of the oldest row
        self._next_id = 0
        self._id_table: IdTable | None = None  # made when an id is first looked up
        self._mmap = mmap
        self._folder: Folder | None = None
        self._stored = Stored()

    def _begin_in(self, path: str | os.PathLike[str] | None) -> None:
        """Make a folder the index's own, at the end of its construction: what is wrong elsewhere makes no folder."""
        if path is not None:
            self._check_mappable()
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
        return Rows(self._keys(found), torch.from_numpy(wanted).to(found.device), self._values(found))

    def _keys(self, numbers: Tensor) -> Tensor:
        """The rows ``[n, D]`` with these sequence numbers."""
        keys = torch.empty(len(numbers), self.dim, dtype=self._layout.dtype, device=numbers.device)
        for piece, slots, rows in self._by_piece(numbers):
            keys[slots] = piece.rows[rows]
        return keys

    def _values(self, numbers: Tensor) -> Tensor | None:
        """The values ``[n, V]`` of the rows with these sequence numbers."""
        values = self._layout.new_values(len(numbers))
        if values is not None:
            for piece, slots, rows in self._by_piece(numbers):
                values[slots] = piece.values[rows]  # type: ignore[index]
        return values

    def pieces(self) -> Iterator[Rows]:
        """All rows, oldest first, a chunk at a time; views that are good until the index changes.

        Raises:
            IndexFileError: a part of the index on disk is torn or altered.
        """
        for piece in self._in_order():
            if piece.part is not None:
                piece.part.check()
            live = torch.arange(max(0, self._oldest - piece.start), len(piece), device=self._layout.device)
            if len(live):
                here = slice(len(piece) - len(live), len(piece))
                yield Rows(piece.rows[here], piece.ids.of(live), None if piece.values is None else piece.values[here])

    def _in_order(self) -> list[Chunk | Tail]:
        return [*self._chunks, self._tail]

    # --- searching --------------------------------------------------------------------------------------------------

    def _check_search(self, query: Tensor, k: int) -> None:
        self._layout.check_rows("query", query, "[N, D]")
        check_count("k", k)
        if len(self) == 0:
            raise ValueError("search: the index is empty; add rows first")
        self._check_parts()

    def _merge_nearest(
        self, ranks: Tensor, numbers: Tensor, query: Tensor, begin: int, codes_budget: int = 2**63
    ) -> None:
        """Merge the exactly nearest of the rows from ``begin`` on into the nearest so far (``nearest_keys_merge_``).

        Args:
            ranks: ``[N, k]`` what the metric compares: float64, smallest first.
            numbers: ``[N, k]`` sequence numbers.
            query: ``[N, D]``.
            begin: a sequence number.
            codes_budget: bytes of codes to leave in memory of those on files' pages; default: all.
        """
        for piece in self._in_order():
            first, last = max(0, begin - piece.start), len(piece)
            if first >= last:
                continue
            where = {"first": first, "last": last, "offset": piece.start}
            nearest_keys_merge_(ranks, numbers, query, piece.searched(), **where, metric=self.metric)
            if piece.part is not None:  # else ever more of the rows would stay in memory
                codes_budget -= piece.searched().nbytes
                piece.part.let_go(keep=() if codes_budget < 0 else ("packed",))

    def _found(self, ranks: Tensor, numbers: Tensor) -> Found:
        """What ``_nearest`` found, as users see it."""
        ids = torch.full_like(numbers, -1)
        values = self._layout.new_values(*numbers.shape)
        for piece, slots, rows in self._by_piece(numbers):
            ids.view(-1)[slots] = piece.ids.of(rows)
            if values is not None:
                values.view(-1, values.shape[-1])[slots] = piece.values[rows]  # type: ignore[index]
        return Found(as_distances(ranks, self.metric), ids, values)

    def _by_piece(self, numbers: Tensor) -> Iterator[tuple[Chunk | Tail, Tensor, Tensor]]:
        """Sequence numbers sorted by where they are: each piece, the slots of ``numbers`` (flat) with it, its rows.

        Pages of a file that are read meanwhile are given back, all but those of codes.
        """
        flat = numbers.flatten()
        order = flat.argsort()
        pieces = self._in_order()
        starts = torch.tensor([*(piece.start for piece in pieces), 2**63 - 1], device=numbers.device)
        bounds = torch.searchsorted(flat[order], starts).tolist()
        for piece, begin, end in zip(pieces, bounds, bounds[1:], strict=False):
            if begin < end:
                here = order[begin:end]
                yield piece, here, flat[here] - piece.start
                if piece.part is not None:
                    piece.part.let_go(keep=("packed",))

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
        self._check_removable(n)
        with self._all_or_none():
            self._forget_before(self._oldest + n)

    def merge(self, others: Sequence[Index], *, keep_ids: bool = True) -> None:
        """Add the rows of other indexes, in their order and oldest first, with their values: all or none.

        Args:
            others: ``ExactIndex`` or ``FaissIndex`` of the same dim, metric, dtype, device and values.
            keep_ids: keep their ids, which must differ; False: give new ones, counting on.

        Raises:
            TypeError, ValueError: an index of another shape, or this one; ids that are not unique (some are named).
            OSError, FolderInUseError, IndexFileError: as ``add``.
        """
        for other in others:
            if not isinstance(other, StoredIndex):
                raise TypeError(f"others: expected ExactIndex or FaissIndex, got {type(other).__name__}")
            self._check_alike(other)
        with self._all_or_none():
            for other in others:
                assert isinstance(other, StoredIndex)
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
            self._check_room()
        self._tail.pack()
        self._check_room()
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
        chunks, stored = list(self._chunks), self._stored.copy()
        oldest, next_id = self._oldest, self._next_id
        try:
            yield
            self._follow()
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

    @classmethod
    def _open(cls, path: str | os.PathLike[str], verify: str, **arguments: Any) -> Self:
        """What ``save`` wrote, with the arguments of the index that are not of its files."""
        check_choice("verify", verify, VERIFY)
        folder = Folder(path)
        while True:
            manifest = folder.read()
            try:
                index = cls._from(folder, manifest, trust=verify == "sizes", **arguments)
            except IndexFileError:
                if folder.read() == manifest:
                    raise
                continue  # a writer replaced the manifest, and deleted a part, in between
            if verify == "now":
                index.verify()
            if "shard" in manifest:
                folder.close("it is a shard, which ShardedIndex changes together with the others; save elsewhere")
            return index

    @classmethod
    def _from(cls, folder: Folder, manifest: dict[str, Any], *, trust: bool, **arguments: Any) -> Self:
        """The index in a folder; ``trust``: do not compare parts with their checksums."""
        if manifest["kind"] != cls.kind:
            raise IndexFileError(f"{folder.path}: expected an index of kind {cls.kind!r}, got {manifest['kind']!r}")
        index = cls(**cls._arguments(manifest), **arguments)
        index._check_mappable()
        index._read(folder, manifest, trust)
        return index

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
        stored = self._stored if own else Stored()
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
        self, folder: Folder, stored: Stored
    ) -> tuple[dict[str, Any], list[PartRecord], list[tuple[int, int, PartRecord]]]:
        """The settings and parts that the index is, and those of the tail; writes what is not ``stored``."""
        for chunk in self._chunks:
            if chunk.start not in stored.chunks:
                self._check_parts()
                stored.chunks[chunk.start] = self._write_chunk(folder, chunk)
        tail_parts = self._write_tail(folder, stored.tail)
        stored.beside = self._write_beside(folder, stored.beside)
        rows = {"rows": len(self), "oldest": self._oldest, "next": self._tail.end, "next_id": self._next_id}
        parts = [stored.chunks[chunk.start] for chunk in self._chunks] + [record for _, _, record in tail_parts]
        settings = {"kind": self.kind, **self._saved_arguments(), **rows}
        return settings, [*parts, *stored.beside], tail_parts

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
        if not self._mmap or (packed is None and self._layout.coded):
            part.check()
        if not self._mmap:
            rows = rows.to(device, copy=True)
            packed, ids, values = (x if x is None else x.to(device, copy=True) for x in (packed, ids, values))
        keys = self._layout.prepared(rows) if packed is None else PreparedKeys(rows, packed, self.metric)
        row_ids = RowIds(about["first_id"]) if ids is None else RowIds(listed=ids)
        return Chunk(about["start"], keys, row_ids, values, part if self._mmap else None)

    def _read(self, folder: Folder, manifest: dict[str, Any], trust: bool) -> None:
        """Take over what is in the folder: rows, and what lies beside them."""
        self._folder = folder
        self._next_id = manifest["next_id"]
        beside = []
        for record in folder.records():
            part = Part(folder.path, record, checked=trust)
            about = record.about
            if about["role"] == "chunk":
                self._chunks.append(self._open_chunk(part))
                self._stored.chunks[about["start"]] = record
                self._tail = Tail(self._layout, self._chunks[-1].end)
            elif about["role"] == "tail":
                if not self._stored.tail:
                    self._tail = Tail(self._layout, about["start"])
                part.check()
                rows, ids, values = (part.tensor(name) for name in ("rows", "ids", "values"))
                assert rows is not None
                first_or_ids = about["first_id"] if ids is None else ids.to(self._layout.device)
                self._tail.append(rows.to(self._layout.device), first_or_ids, values)
                self._stored.tail.append((about["start"], about["rows"], record))
            else:
                beside.append(part)
        self._oldest = manifest["oldest"]
        if len(self._tail) == 0 and not self._chunks:
            self._tail = Tail(self._layout, manifest["next"])
        if self._tail.end != manifest["next"]:
            raise IndexFileError(f"{folder.path}: the parts end at row {self._tail.end}, not at {manifest['next']}")
        self._tail.pack()
        self._stored.beside = [part.record for part in beside]
        self._opened(beside)

    def _check_parts(self) -> None:
        """Check the parts that have not been."""
        parts = [chunk.part for chunk in self._chunks if chunk.part is not None and not chunk.part.checked]
        if parts:
            with ThreadPoolExecutor(max(1, min(torch.get_num_threads(), 16))) as pool:
                list(pool.map(Part.check, parts))

    # --- what a kind of index adds ------------------------------------------------------------------------------------

    def _saved_arguments(self) -> dict[str, Any]:
        """The arguments of the index that belong to its files, as JSON."""
        layout = self._layout
        return {
            "dim": layout.dim,
            "metric": layout.metric,
            "dtype": _name_of(layout.dtype),
            "values_dim": layout.values_dim,
            "values_dtype": _name_of(layout.values_dtype),
            "capacity": self.capacity,
            "chunk_rows": layout.chunk_rows,
        }

    @classmethod
    def _arguments(cls, manifest: dict[str, Any]) -> dict[str, Any]:
        """``_saved_arguments`` read back."""
        plain = {name: manifest[name] for name in ("dim", "metric", "values_dim", "capacity", "chunk_rows")}
        return plain | {name: getattr(torch, manifest[name]) for name in ("dtype", "values_dtype")}

    def _write_beside(self, folder: Folder, written: list[PartRecord]) -> list[PartRecord]:
        """The parts beside those of rows, written where ``written`` does not serve any more."""
        return []

    def _opened(self, beside: list[Part]) -> None:
        """Rows were opened, and these parts beside them."""

    def _follow(self) -> None:
        """Rows came or went; raising takes the change back."""

    def _check_room(self) -> None:
        """Rows came; raising takes the change back."""

    def _held_bytes(self) -> int:
        """What is in RAM and nowhere else."""
        table = 0 if self._id_table is None else self._id_table.nbytes
        return sum(chunk.held_bytes for chunk in self._chunks) + self._tail.held_bytes + table

    # --- checks -----------------------------------------------------------------------------------------------------

    def _check_mappable(self) -> None:
        if self._mmap and self._layout.device.type != "cpu":
            device = self._layout.device
            raise ValueError(f"mmap: rows on {device} cannot be read where they lie on disk; pass mmap=False")

    def _check_rows(self, keys: Tensor, values: Tensor | None) -> None:
        self._layout.check_rows("keys", keys, "[n, D]")
        self._layout.check_finite("keys", keys)
        self._layout.check_values(values, len(keys))

    def _check_alike(self, other: StoredIndex) -> None:
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
