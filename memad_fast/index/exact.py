"""ExactIndex: a memory of any size, searched exactly: the screen of ``nearest_keys`` over chunks.

                     in RAM                                on disk, if the index has a folder
    full chunks      int8 codes and bounds, D + 24 B/row   original rows, read for what codes cannot decide; values, ids
    tail             codes, rows, values, ids              what was saved

A search goes over the chunks with ``nearest_keys_merge_``: what was found in one prunes the next, and what is left of a
chunk is computed in float64 from its original rows. So results are those of brute force in float64 over all rows in
order of age, ties to the oldest (csrc/cpu/README_nearest_keys.md has the proof).
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from memad_fast.index.base import Found, IndexStats, joined
from memad_fast.index.chunks import Layout
from memad_fast.index.sizes import Estimate, chunk_rows_for, parse_bytes
from memad_fast.index.stored import StoredIndex

_SEARCH_BYTES = 1 << 28  # of a search beside its results, without a budget
_ID_TABLE_BYTES = 16  # a row with an id of its own


class ExactIndex(StoredIndex):
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

    kind = "exact"

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
        self.memory_budget = None if memory_budget is None else parse_bytes(memory_budget)
        super().__init__(
            dim, metric=metric, dtype=dtype, device=device, values_dim=values_dim, values_dtype=values_dtype,
            capacity=capacity, chunk_rows=chunk_rows, budget=self.memory_budget, coded=True, mmap=mmap,
        )  # fmt: skip
        self._begin_in(path)

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
            kind=self.kind,
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
        layout = Layout(dim, "l2", dtype, values_dim, values_dtype, torch.device("cpu"), size, True)
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
        self._check_search(query, k)
        block = max(1, self._search_bytes() // (64 * k))
        return joined([self._found(*self._nearest(part, k)) for part in query.detach().split(block)])

    def _nearest(self, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k nearest of each query: sequence numbers, and what the metric compares: float64, smallest first."""
        shape, device = (len(query), k), self._layout.device
        ranks = torch.full(shape, torch.nan, dtype=torch.float64, device=device)
        numbers = torch.full(shape, -1, dtype=torch.int64, device=device)
        self._merge_nearest(ranks, numbers, query, self._oldest, self._codes_budget())
        return ranks, numbers

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
        return cls._open(path, verify, mmap=mmap, device=device, memory_budget=memory_budget)

    # --- memory -----------------------------------------------------------------------------------------------------

    def _search_bytes(self) -> int:
        return _SEARCH_BYTES if self.memory_budget is None else self.memory_budget // 8

    def _codes_budget(self) -> int:
        """What of the budget is left for codes on files' pages."""
        if self.memory_budget is None:
            return 2**63
        return max(0, self.memory_budget - self._held_bytes() - self._search_bytes())

    def _check_room(self) -> None:
        if self.memory_budget is None:
            return
        needed = self._held_bytes() + self._search_bytes()
        if needed > self.memory_budget:
            advice = "" if self._folder is not None and self._mmap else "; an index with a path leaves rows on disk"
            raise ValueError(f"memory_budget: {self.memory_budget} bytes, and {needed} are needed{advice}")
