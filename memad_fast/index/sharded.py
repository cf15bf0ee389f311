"""ShardedIndex: one exact memory whose rows are spread over the ranks of a ``torch.distributed`` group.

    rank 0   ExactIndex   rows 0 … 39             180 … 219            each rank holds rows, in a shard of its own,
    rank 1   ExactIndex           40 … 99                   220 …      and knows their numbers over all shards
    rank 2   ExactIndex                  100 … 179                     (ages.py)

A search sends the queries of every rank to all; each shard finds its own nearest by what the metric compares, in
float64, and sends them back; the rank that asked sorts them by that and by number over all shards. So results are those
of one ``ExactIndex`` that was given all rows in the same order, bit for bit, ties included.

Changes are made on all ranks or on none: each tries, then all agree (ranks.py), and take it back where one failed.

Saving takes two steps, so that whenever which process is killed, all shards come back in one state:

    every rank   writes parts; prepared.json = the state to come, with the number of this save
    all agree    from here on every shard has the new state, as every shard has the old one until here
    every rank   renames prepared.json to manifest.json, deletes what only the old state needs

Opening takes the newest state that all shards have, prepared or not. Nothing of it needs a file system in common.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed

from memad_fast._arguments import check_choice
from memad_fast.index.ages import Ages
from memad_fast.index.base import Found, Index, IndexStats, joined
from memad_fast.index.chunks import some
from memad_fast.index.exact import ExactIndex
from memad_fast.index.files import MANIFEST, Folder, IndexFileError, Part
from memad_fast.index.ids import Ids
from memad_fast.index.ranks import Ranks, caught, check_same
from memad_fast.index.sizes import check_count
from memad_fast.index.stored import VERIFY, Rows, as_distances, as_ids
from memad_fast.ops.nearest_keys_merge_ import best_first


class ShardedIndex(Index):
    """An exact memory over several processes and machines: each rank holds rows, all answer together.

    Args:
        dim: D, the length of a row.
        group: the ranks; default: all of ``torch.distributed``. Where that is not initialised the index has one shard.
        capacity: rows that there is room for on all ranks together; further ones push out the oldest, wherever they
            are. None: as many as come.
        chunk_rows: as of ``ExactIndex``; the default of a ring goes by a rank's share of the capacity.
        path: a folder in which each rank writes its own, ``shard-003-of-008``: on one file system or each on its own.
        **options: of each rank's ``ExactIndex``: ``metric``, ``dtype``, ``device``, ``values_dim``, ``values_dtype``,
            ``memory_budget`` (of a rank), ``mmap``.

    Every method but ``len``, ``close`` and the attributes is collective: all ranks call the same ones in the same
    order. What one rank is given wrongly, or cannot do, is an error on all of them that names the rank, and changes
    nothing anywhere. When a process dies, the others raise what the backend says (gloo: at once; NCCL: after the
    group's timeout); start all again, and open what was saved. The timeout must be longer than the longest save.

    Rows are ordered by age: call after call of ``add``, and within a call rank 0's first, then rank 1's, and so on.
    Results are those of one ``ExactIndex`` that was given the same rows in that order, bit for bit.

    ``shard`` is the rank's own ``ExactIndex``, to read: ``shard.stats()``, ``shard.pieces()``.

    Cost: a search is one of each shard, on all ranks' queries; beside it the queries go to every rank, 24 bytes and the
    values of k rows come from each shard for each query, and all wait for each other five times (some 2 ms between
    processes of one busy machine). A row takes what it takes in ``ExactIndex``, and 8 bytes where a shard's ids do not
    count on, as is usual with several ranks; every call of ``add`` takes 16.

    Tensors travel by the group's backend: gloo, or NCCL with ``torch.cuda.set_device`` called on each rank, wherever
    rows are. Only gloo, between processes of one machine, has been run yet.

    Raises:
        TypeError, ValueError, OSError, IndexFileError, FolderInUseError: as ``ExactIndex``; settings that differ.
        RuntimeError: several processes (``WORLD_SIZE``), and ``torch.distributed`` is not initialised; the ranks call
            different methods.

    Example:
        >>> import torch
        >>> from memad_fast.index import ShardedIndex
        >>> # torch.distributed.init_process_group("gloo")  # in each process of torchrun; without: one shard
        >>> index = ShardedIndex(2)
        >>> index.add(torch.tensor([[0.0, 0.0], [3.0, 4.0]]))  # this rank's rows
        tensor([0, 1])
        >>> index.search(torch.tensor([[3.0, 3.0]]), k=1)  # this rank's queries, among the rows of all
        Found(distances=tensor([[1.]]), ids=tensor([[1]]), values=None)
    """

    shard: ExactIndex  # the rows of this rank

    def __init__(
        self,
        dim: int,
        *,
        group: distributed.ProcessGroup | None = None,
        capacity: int | None = None,
        chunk_rows: int | None = None,
        path: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        ranks = Ranks(group)
        shard = None
        try:
            with caught() as outcome:
                folder = None if path is None else _shard_path(path, ranks)
                shard = _new_shard(dim, capacity, chunk_rows, folder, ranks.size, options)
            ranks.agree("ShardedIndex", outcome.error)
            assert shard is not None
            _check_alike(ranks, shard)
            self._begin(ranks, shard)
            with caught() as outcome:
                self._settle()
            ranks.agree("ShardedIndex", outcome.error)
        except BaseException:
            if shard is not None:
                shard.close()
            raise

    def _begin(self, ranks: Ranks, shard: ExactIndex) -> None:
        self._ranks = ranks
        self.shard = shard
        self.dim, self.metric, self.capacity = shard.dim, shard.metric, shard.capacity
        self.dtype, self.device = shard.dtype, shard.device
        self.values_dim, self.values_dtype = shard.values_dim, shard.values_dtype
        self._ages = Ages()
        self._oldest = self._next = 0  # numbers over all shards: of the oldest row, of the next
        self._next_id = 0

    # --- what there is ----------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """The number of rows of all ranks."""
        return self._next - self._oldest

    @property
    def path(self) -> Path | None:
        """The folder of the shards' folders; None where there is none yet."""
        return None if self.shard.path is None else self.shard.path.parent

    @property
    def next_id(self) -> int:
        """The id that the next row gets if none is given: one more than the largest ever added on any rank."""
        return self._next_id

    def __repr__(self) -> str:
        shard = f"rank {self._ranks.rank} of {self._ranks.size}: {len(self.shard)}"
        return f"ShardedIndex({len(self)} x {self.dim}, {self.dtype}, metric={self.metric!r}; {shard})"

    def stats(self) -> IndexStats:
        """Sizes in rows and bytes, of all ranks together; ``shard.stats()`` has this one's."""
        ram_bytes = disk_bytes = 0
        with caught() as outcome:
            shard = self.shard.stats()
            ram_bytes, disk_bytes = shard.ram_bytes, shard.disk_bytes
        every = self._ranks.agree("stats", outcome.error, ram_bytes, disk_bytes)
        ram_bytes, disk_bytes = (sum(column) for column in zip(*every, strict=True))
        return IndexStats(len(self), self.dim, self.metric, "exact", ram_bytes, disk_bytes, self.capacity)

    def rows(self, ids: Tensor | Sequence[int]) -> Rows:
        """The rows with these ids ``[n]``, whichever ranks hold them; each rank asks for its own, maybe none.

        Returns:
            ``Rows(keys, ids, values)``, as ``ExactIndex.rows``. Every shard sends n rows, of which those it has count.

        Raises on all ranks what ``ExactIndex.rows`` would on one.
        """
        wanted = np.empty(0, dtype=np.int64)
        with caught() as outcome:
            wanted = as_ids(ids)
            self.shard._check_parts()
        counts = [count for (count,) in self._ranks.agree("rows", outcome.error, len(wanted))]
        every = self._ranks.gather(torch.from_numpy(wanted)[:, None], counts)[:, 0].numpy()
        parts: list[Tensor] = []
        with caught() as outcome:
            numbers = torch.from_numpy(self.shard._table().find(every, self.shard._oldest)).to(self.device)
            values = self.shard._values(numbers)
            parts = [numbers[:, None] >= 0, self.shard._keys(numbers), *([] if values is None else [values])]
        self._ranks.agree("rows", outcome.error)
        held, *found = self._ranks.exchange(counts, *parts)
        held = held[:, :, 0]
        with caught() as outcome:
            if (missing := wanted[~held.any(dim=0).cpu().numpy()]).size:
                raise ValueError(f"ids: {some(missing)} not in the index: never added, or removed since")
        self._ranks.agree("rows", outcome.error)
        of, shard = torch.arange(len(wanted), device=self.device), held.int().argmax(dim=0)
        keys, *rest = (part[shard, of] for part in found)
        return Rows(keys, torch.from_numpy(wanted).to(self.device), rest[0] if rest else None)

    # --- searching --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def search(self, query: Tensor, k: int = 1) -> Found:
        """The k nearest rows, of all ranks, of each of this rank's queries, exactly.

        Args:
            query: ``[N, D]``, dtype and device of the index: other queries on every rank, and as many as it has; a
                rank that has none gives ``[0, D]``.
            k: how many; the same on all ranks.

        Returns:
            ``Found(distances, ids, values)``, as ``ExactIndex.search``: those of this rank's queries.

        Gradients: none. Raises on all ranks what ``ExactIndex.search`` would on one.
        """
        block = 0
        with caught() as outcome:
            self.shard._layout.check_rows("query", query, "[N, D]")
            check_count("k", k)
            if len(self) == 0:
                raise ValueError("search: the index is empty; add rows first")
            self.shard._check_parts()
            candidate = 64 + 2 * self.shard._layout.value_bytes  # bytes, sent and received
            block = max(1, self.shard._search_bytes() // (candidate * k * self._ranks.size))
        said = self._ranks.agree("search", outcome.error, *((0, 0, 0) if outcome.error else (len(query), k, block)))
        counts, ks, blocks = zip(*said, strict=True)
        check_same("k", ks)
        block = min(blocks)
        found = []
        for first in range(0, max(*counts, 1), block):
            parts = [min(max(count - first, 0), block) for count in counts]
            found.append(self._search(query[first : first + block], k, parts))
        return joined(found)

    def _search(self, query: Tensor, k: int, counts: Sequence[int]) -> Found:
        """The rows found for this rank's queries, where each rank has its ``counts``."""
        queries = self._ranks.gather(query, counts)
        candidates: list[Tensor] = []
        with caught() as outcome:
            ranks, rows = self.shard._nearest(queries, k)
            _, ids, values = self.shard._found(ranks, rows)
            candidates = [ranks, self._ages.over_all(rows), ids, *([] if values is None else [values])]
        self._ranks.agree("search", outcome.error)
        # [shards, n, k, ...] as [n, shards · k, ...]
        here = [part.transpose(0, 1).flatten(1, 2) for part in self._ranks.exchange(counts, *candidates)]
        order = best_first(here[0], here[1])[:, :k]
        query_of = torch.arange(len(query), device=order.device)[:, None]
        ranks, _, ids, *rest = (part[query_of, order] for part in here)
        return Found(as_distances(ranks, self.metric), ids, rest[0] if rest else None)

    # --- changing ---------------------------------------------------------------------------------------------------

    def add(self, keys: Tensor, values: Tensor | None = None, ids: Tensor | Sequence[int] | None = None) -> Tensor:
        """Add rows of every rank as the newest, rank 0's first: all or none of them. Each stays on its rank.

        Args:
            keys: ``[n, D]`` in the dtype and on the device of the index, finite; a rank that has none gives ``[0, D]``.
            values: ``[n, V]`` in their dtype, in an index with values.
            ids: n integers of at least 0 that no row has, on any rank: given on all ranks that have rows, or on none.
                Default: counting on from the largest ever added, in the order of rows.

        Returns:
            The ids ``[n]`` int64 of this rank's rows.

        Cost: that of ``ExactIndex.add``, at the same time on all ranks; ids of one's own are sent to all ranks.

        Raises on all ranks what ``ExactIndex.add`` would on one, and names the rank.
        """
        own: Ids | None = None
        with caught() as outcome:
            self.shard._check_rows(keys, values)
            if ids is not None:
                own = as_ids(ids)
                if len(own) != len(keys):
                    raise ValueError(f"ids: expected {len(keys)} like keys, got {len(own)}")
            self._lock()
        said = self._ranks.agree("add", outcome.error, 0 if outcome.error else len(keys), own is not None)
        counts = [count for count, _ in said]
        given = {bool(has_ids) for count, has_ids in said if count}
        if len(given) > 1:
            raise ValueError("ids: expected on all ranks that add rows or on none, got them on some")
        offset, following = sum(counts[: self._ranks.rank]), self._next_id + sum(counts)
        if given == {True}:
            own = np.empty(0, dtype=np.int64) if own is None else own
            following = max(self._next_id, self._check_ids("add", own, counts, [self.shard]) + 1)
        with self._changing("add"):
            self._ages.append(self.shard._tail.end, self._next + offset)
            added = self.shard._add(keys, values, self._next_id + offset if own is None else own)
            self._advance(sum(counts), following)
        return added

    def remove_oldest(self, n: int) -> None:
        """Remove the n oldest rows, whichever ranks hold them; the same n on all ranks.

        Raises on all ranks what ``ExactIndex.remove_oldest`` would on one.
        """
        with caught() as outcome:
            self._check_removable(n)
            self._lock()
        check_same("n", [n for (n,) in self._ranks.agree("remove_oldest", outcome.error, 0 if outcome.error else n)])
        with self._changing("remove_oldest"):
            self._forget_before(self._oldest + n)

    def merge(self, others: Sequence[Index], *, keep_ids: bool = True) -> None:
        """Add the rows of other sharded indexes, in their order and oldest first: all or none. Each stays on its rank.

        Args:
            others: ``ShardedIndex`` over the same ranks, of the same dim, metric, dtype, device and values.
            keep_ids: keep their ids, which must differ; False: give new ones, counting on.

        Raises on all ranks what ``ExactIndex.merge`` would on one.
        """
        new: list[ShardedIndex] = []
        pieces: list[list[Ids]] = []  # ids of each
        with caught() as outcome:
            for other in others:
                if not isinstance(other, ShardedIndex):
                    raise TypeError(f"others: expected ShardedIndex, got {type(other).__name__}")
                if (other._ranks.rank, other._ranks.size) != (self._ranks.rank, self._ranks.size):
                    raise ValueError("others: expected indexes over the same ranks")
                self.shard._check_alike(other.shard)
                new.append(other)
                if keep_ids:
                    pieces.append([piece.ids.cpu().numpy() for piece in other.shard.pieces()])
            self._lock()
        said = self._ranks.agree("merge", outcome.error, len(new), bool(keep_ids), max(map(len, pieces), default=0))
        check_same("others", [count for count, _, _ in said])
        check_same("keep_ids", [keep for _, keep, _ in said])
        following = [self._next_id]  # the next id after each of them
        if not keep_ids:
            for other in new:
                following.append(following[-1] + len(other))
        for at, ids in enumerate(pieces):
            known = [self.shard, *(other.shard for other in new[:at])]
            largest = following[-1] - 1
            for piece in range(max(count for _, _, count in said)):
                part = ids[piece] if piece < len(ids) else np.empty(0, dtype=np.int64)
                counts = [count for (count,) in self._ranks.agree("merge", None, len(part))]
                largest = max(largest, self._check_ids("merge", part, counts, known))
            following.append(largest + 1)
        with self._changing("merge"):
            for other, next_id in zip(new, following[1:], strict=True):
                self._take(other, keep_ids, next_id)

    def _take(self, other: ShardedIndex, keep_ids: bool, next_id: int) -> None:
        """Add the rows of another index's shard on this rank, run by run."""
        here = other.shard._oldest
        for keys, ids, values in other.shard.pieces():
            for begin, number, count in other._ages.runs(here, here + len(keys)):
                part, age = slice(begin - here, begin - here + count), number - other._oldest
                self._ages.append(self.shard._tail.end, self._next + age)
                new_ids = ids[part].cpu().numpy() if keep_ids else self._next_id + age
                self.shard._add(keys[part], None if values is None else values[part], new_ids)
            here += len(keys)
        self._advance(len(other), next_id)

    def _advance(self, count: int, next_id: int) -> None:
        """Rows have come on all ranks together."""
        self._next += count
        self._next_id = next_id
        self._forget_before(self._next - self.capacity if self.capacity is not None else 0)

    def _forget_before(self, oldest: int) -> None:
        """Rows before this number over all shards are no more."""
        self._oldest = max(self._oldest, oldest)
        self.shard._forget_before(self._ages.first_from(self._oldest, self.shard._tail.end))

    @contextlib.contextmanager
    def _changing(self, step: str) -> Iterator[None]:
        """A change of all shards, whose folders are locked: taken back on all ranks if it fails on one."""
        before, runs = (self._oldest, self._next, self._next_id), len(self._ages)
        try:
            with contextlib.ExitStack() as stack:
                with caught() as outcome:
                    self._settle()
                    stack.enter_context(self.shard._all_or_none())
                    yield
                self._ranks.agree(step, outcome.error)
        except BaseException:
            self._oldest, self._next, self._next_id = before
            self._ages.shrink_to(runs)
            raise
        self._ages.forget_before(self.shard._oldest)

    def _check_ids(self, step: str, ids: Ids, counts: Sequence[int], known: Sequence[ExactIndex]) -> int:
        """No two ranks give an id, and none of these shards has one; the largest, −1 without any."""
        every = self._ranks.gather(torch.from_numpy(ids)[:, None], counts)[:, 0].numpy()
        unique, times = np.unique(every, return_counts=True)
        if (twice := unique[times > 1]).size:
            givers = np.repeat(np.arange(len(counts)), counts)[np.isin(every, twice)]
            raise ValueError(f"ids: {some(twice)} given more than once, by {some(np.unique(givers), 'rank')}")
        with caught() as outcome:
            for shard in known:
                if (held := every[shard._table().find(every, shard._oldest) >= 0]).size:
                    raise ValueError(f"ids: {some(held)} in the index already")
        self._ranks.agree(step, outcome.error)
        return int(every.max(initial=-1))

    # --- files ------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str] | None = None) -> None:
        """Write what changed since the last ``save`` on every rank; when it returns, all rows survive a crash.

        Args:
            path: a folder, in which each rank has its own; default: the index's. As ``ExactIndex.save``.

        Whichever processes are killed, at any moment: all shards open in the state that was saved last, or in the one
        that was being saved then.

        Raises:
            ValueError: no path, and the index has no folder.
            OSError, IndexFileError, FolderInUseError: on all ranks what ``ExactIndex.save`` raises on one, which is
                named. What was saved last stands on all.
        """
        own, folder = False, None
        with caught() as outcome:
            if path is None and self.path is None:
                raise ValueError("path: the index has no folder yet; say where to save it")
            folder = self.shard._folder_at(None if path is None else _shard_path(path, self._ranks))
            own = folder is self.shard._folder
        said = self._ranks.agree("save", outcome.error, own, secrets.randbits(62))
        if len({mine for mine, _ in said}) > 1:
            raise ValueError("path: expected the index's own folder on all ranks or on none")
        assert folder is not None
        try:
            if not own:
                states, every = _states_of_all(self._ranks, "save", folder)
                folder.choose(states[_newest_of_all(folder, every)])
            with caught() as outcome:
                folder.lock()
            self._ranks.agree("save", outcome.error)
            self._save(folder, number=said[0][1])
        except BaseException:
            if not own and folder is not self.shard._folder:
                folder.close()
            raise

    def _save(self, folder: Folder, number: int) -> None:
        """Save to a folder that this rank has locked, as all have theirs."""
        shard = {
            "rank": self._ranks.rank, "of": self._ranks.size, "save": number, "oldest": self._oldest,
            "next": self._next, "next_id": self._next_id,
        }  # fmt: skip
        with contextlib.ExitStack() as stack:
            prepared = None
            with caught() as outcome:
                folder.settle()
                settings, parts = stack.enter_context(self.shard._writing(folder))
                ages = folder.write_part(self._ages.tensors(), {"role": "ages"})
                prepared = folder.prepare(settings | {"shard": shard}, [*parts, ages])
            try:
                self._ranks.agree("save", outcome.error)
            except Exception:
                # A rank that lost the others keeps both states: these may have agreed. The next ``open`` sees.
                if not self._ranks.lost:
                    with contextlib.suppress(OSError, IndexFileError):  # else the next change does it
                        folder.settle()
                raise
            with caught() as outcome:
                folder.choose(prepared)
                folder.settle()
        self._ranks.agree("save", outcome.error)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        group: distributed.ProcessGroup | None = None,
        mmap: bool = True,
        device: str | torch.device = "cpu",
        memory_budget: int | str | None = None,
        verify: str = "first_use",
    ) -> ShardedIndex:
        """Open what was saved by as many ranks; adding to it goes on where it was.

        Args:
            path: the folder that was saved to; each rank needs its own shard in there.
            group: as of the index.
            mmap: this and the following as ``ExactIndex.open``.
            device: where to put the rows.
            memory_budget: of a rank.
            verify: when parts are compared with their checksums.

        Raises on all ranks:
            IndexFileError: nothing was saved there; it was saved by another number of ranks; a rank has no shard, or
                that of another save; a file is missing, torn, altered or of a later version. It is named.
            ValueError: an argument is not what is said above.
        """
        ranks = Ranks(group)
        with caught() as outcome:
            check_choice("verify", verify, VERIFY)
            folder = Folder(_shard_path(path, ranks))
        ranks.agree("open", outcome.error)
        while True:
            states, every = _states_of_all(ranks, "open", folder)
            index = None
            with caught() as outcome:
                folder.choose(states[_newest_of_all(folder, every)])
                index = cls._from(ranks, folder, mmap, torch.device(device), memory_budget, verify)
            changed = outcome.error is not None and _has_changed(folder, ranks, list(states))
            if any(there for (there,) in ranks.agree("open", None, changed)):
                continue  # a writer replaced manifests, and deleted parts, in between
            ranks.agree("open", outcome.error)
            assert index is not None
            return index

    @classmethod
    def _from(
        cls, ranks: Ranks, folder: Folder, mmap: bool, device: torch.device, memory_budget: int | str | None,
        verify: str,
    ) -> ShardedIndex:  # fmt: skip
        """The index in the state that the folder has chosen."""
        if folder.manifest is None:
            raise IndexFileError(f"{folder.path}: no index was saved there{_other_sizes(folder.path.parent, ranks)}")
        options = {"mmap": mmap, "device": device, "memory_budget": memory_budget}
        shard = ExactIndex._from(folder, folder.manifest, trust=verify == "sizes", **options)
        if verify == "now":
            shard.verify()
        index = cls.__new__(cls)
        index._begin(ranks, shard)
        about = folder.manifest["shard"]
        index._oldest, index._next, index._next_id = about["oldest"], about["next"], about["next_id"]
        part = Part(folder.path, next(record for record in folder.records() if record.about["role"] == "ages"))
        part.check()
        here, over_all = part.tensor("here"), part.tensor("over_all")
        index._ages = Ages(here, over_all)
        return index

    def verify(self) -> None:
        """Compare every part on every rank's disk with its checksum, whether it was before or not.

        Raises on all ranks:
            IndexFileError: a part is torn or altered. It is named.
        """
        with caught() as outcome:
            self.shard.verify()
        self._ranks.agree("verify", outcome.error)

    def close(self) -> None:
        """Let others write to this rank's folder. The index can be searched on, but not changed."""
        self.shard.close()

    def _lock(self) -> None:
        """Become the writer of this rank's folder; what a crash left prepared in there stays until all ranks are."""
        if self.shard._folder is not None:
            self.shard._folder.lock()

    def _settle(self) -> None:
        """All ranks are writers: finish or take back what was prepared when one was killed."""
        if self.shard._folder is not None:
            self.shard._folder.settle()


def _new_shard(
    dim: int, capacity: int | None, chunk_rows: int | None, path: Path | None, ranks: int, options: dict[str, Any]
) -> ExactIndex:
    if capacity is not None:
        check_count("capacity", capacity)
        share = -(-capacity // ranks)
        chunk_rows = ExactIndex(dim, capacity=share, chunk_rows=chunk_rows, **options)._layout.chunk_rows
    # The newest rows of all are among the newest of each shard: its capacity may be that of all.
    return ExactIndex(dim, capacity=capacity, chunk_rows=chunk_rows, path=path, **options)


def _check_alike(ranks: Ranks, shard: ExactIndex) -> None:
    """The shards have the same settings."""
    names = ("dim", "metric", "dtype", "values_dim", "values_dtype", "capacity")
    every = ranks.tell({name: getattr(shard, name) for name in names})
    for name in names:
        if len({settings[name] for settings in every}) > 1:
            got = ", ".join(f"{settings[name]} on rank {rank}" for rank, settings in enumerate(every))
            raise ValueError(f"{name}: expected the same on all ranks, got {got}")


# --- states of folders ---------------------------------------------------------------------------------------------


def _shard_path(path: str | os.PathLike[str], ranks: Ranks) -> Path:
    return Path(path) / f"shard-{ranks.rank:03d}-of-{ranks.size:03d}"


def _states_of_all(
    ranks: Ranks, step: str, folder: Folder
) -> tuple[dict[int | None, dict[str, Any] | None], list[list[int | None]]]:
    """The states of this rank's folder, and the numbers of those of every rank's."""
    states: dict[int | None, dict[str, Any] | None] = {}
    with caught() as outcome:
        states = _states(folder, ranks)
    ranks.agree(step, outcome.error)
    return states, ranks.tell(list(states))


def _states(folder: Folder, ranks: Ranks) -> dict[int | None, dict[str, Any] | None]:
    """What a shard's folder may be opened as, by the number of the save: its state, and what is prepared.

    Raises:
        IndexFileError: it is no shard's, or that of another rank.
    """
    prepared = folder.prepared  # first: it may become the folder's state meanwhile, not the other way round
    current = folder.read() if folder.exists else None
    states: dict[int | None, dict[str, Any] | None] = {}
    for manifest in (current, prepared):
        if manifest is None:
            continue
        about = manifest.get("shard")
        if about is None:
            raise IndexFileError(f"{folder.path / MANIFEST}: no shard; ExactIndex.open opens it")
        if (about["rank"], about["of"]) != (ranks.rank, ranks.size):
            raise IndexFileError(
                f"{folder.path / MANIFEST}: expected shard {ranks.rank} of {ranks.size},"
                f" got shard {about['rank']} of {about['of']}"
            )
        states[about["save"]] = manifest
    return states if current is not None else {None: None, **states}


def _has_changed(folder: Folder, ranks: Ranks, saves: Sequence[int | None]) -> bool:
    """Whether the folder may be opened as other saves by now."""
    try:
        return list(_states(folder, ranks)) != saves
    except IndexFileError:
        return True


def _newest_of_all(folder: Folder, every: Sequence[Sequence[int | None]]) -> int | None:
    """The newest state that the folders of all ranks have. Two that all have are the same two, the newer last.

    Raises:
        IndexFileError: there is none.
    """
    common = [save for save in every[0] if all(save in states for states in every)]
    if not common:
        got = ", ".join(
            f"rank {rank} has {' and '.join('none' if save is None else f'{save:x}' for save in states)}"
            for rank, states in enumerate(every)
        )
        raise IndexFileError(f"{folder.path.parent}: expected shards of the same save on all ranks, {got}")
    return common[-1]


def _other_sizes(path: Path, ranks: Ranks) -> str:
    """What else lies in a folder without the shard that was looked for, in words."""
    names = [file.name for file in path.iterdir()] if path.is_dir() else []
    sizes = {int(match[1]) for name in names if (match := re.fullmatch(r"shard-\d+-of-(\d+)", name))} - {ranks.size}
    there = " and ".join(map(str, sorted(sizes)))
    return f" by {ranks.size} ranks, but by {there}: open it with as many" if sizes else ""
