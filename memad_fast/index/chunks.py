"""The pieces that an index keeps rows in: a tail that grows, and full chunks that never change again.

    sequence number   0 ···········│··········· ···│
                      [  chunk  ] [  chunk  ] [ tail ··room·· ]
                            │                       │
                          oldest                   next

A chunk's codes are centred on its own mean. The tail's buffers double until they hold a chunk; each time, and when it
is full, its rows are packed anew around their mean, so that a row is packed three times on average and the centre is
never far from where the rows are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from memad_fast._backend import served_by_cpu
from memad_fast._checks import check_float, check_rank, check_size, check_tensor
from memad_fast._library import write
from memad_fast.index.files import Part
from memad_fast.ops.prepare_keys import PreparedKeys, packed_bytes, prepare_keys

SMALLEST_TAIL = 1024  # rows
MOST_NAMED = 10  # of what an error lists


@dataclass(frozen=True)
class Layout:
    """What all rows of an index have in common."""

    dim: int
    metric: str
    dtype: torch.dtype
    values_dim: int | None
    values_dtype: torch.dtype
    device: torch.device
    chunk_rows: int
    coded: bool  # whether rows are packed for exact searches

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.dim * self.dtype.itemsize

    @property
    def value_bytes(self) -> int:
        """Bytes of a row's values."""
        return (self.values_dim or 0) * self.values_dtype.itemsize

    def codes_bytes(self, rows: int) -> int:
        """Bytes of the packed form."""
        return packed_bytes(rows, self.dim, on_gpu=self.device.type == "cuda")

    def tail_rows(self, rows: int) -> int:
        """The rows that a tail of ``rows`` has room for."""
        room = min(SMALLEST_TAIL, self.chunk_rows)
        while room < min(rows, self.chunk_rows):
            room = min(2 * room, self.chunk_rows)
        return room

    def prepared(self, rows: Tensor) -> PreparedKeys:
        """A chunk's rows with their codes, if the index has codes."""
        return prepare_keys(rows, metric=self.metric) if self.coded else PreparedKeys(rows, None, self.metric)

    def new_values(self, *shape: int) -> Tensor | None:
        """Zeros ``[*shape, V]``; None in an index without values."""
        if self.values_dim is None:
            return None
        return torch.zeros(*shape, self.values_dim, dtype=self.values_dtype, device=self.device)

    def check_rows(self, name: str, rows: Tensor, shape: str) -> None:
        """Rows ``[n, D]`` that the index can take or search for, but for what is not finite."""
        check_float(name, rows)
        if rows.dtype != self.dtype:
            raise TypeError(f"{name}: expected {self.dtype} like the index, got {rows.dtype}")
        if rows.device.type != self.device.type:
            raise ValueError(f"{name}: expected device {self.device} like the index, got {rows.device}")
        check_rank(name, rows, 2, shape)
        check_size(name, rows, 1, self.dim, "like the index")

    def check_finite(self, name: str, rows: Tensor) -> None:
        """No row has a NaN or an infinity; those that have are named."""
        for first in range(0, len(rows), self.chunk_rows):
            bad = ~rows[first : first + self.chunk_rows].isfinite().all(dim=1)
            if bad.any():
                which = some(bad.nonzero()[:, 0].cpu().numpy() + first, "row")
                raise ValueError(f"{name}: expected finite rows, got a NaN or an infinity in {which}")

    def check_values(self, values: Tensor | None, count: int) -> None:
        """The values of ``count`` rows."""
        if self.values_dim is None:
            if values is not None:
                raise ValueError("values: the index has none; make it with values_dim")
            return
        check_tensor("values", values)
        assert values is not None
        if values.dtype != self.values_dtype:
            raise TypeError(f"values: expected {self.values_dtype} like the index, got {values.dtype}")
        check_rank("values", values, 2, "[n, V]")
        check_size("values", values, 0, count, "like keys")
        check_size("values", values, 1, self.values_dim, "like the index")
        if values.device.type != self.device.type:
            raise ValueError(f"values: expected device {self.device} like the index, got {values.device}")


@dataclass(frozen=True)
class RowIds:
    """The ids of consecutive rows: their numbers in the chunk plus ``first``, or listed."""

    first: int = 0
    listed: Tensor | None = None  # [n] int64

    def of(self, rows: Tensor) -> Tensor:
        """The ids of rows of the chunk."""
        return rows + self.first if self.listed is None else self.listed[rows]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return 0 if self.listed is None else self.listed.nbytes


@dataclass(frozen=True)
class Chunk:
    """Full, and in memory or in a file: row i has the sequence number ``start`` + i."""

    start: int
    keys: PreparedKeys
    ids: RowIds
    values: Tensor | None
    part: Part | None = None  # on whose pages the tensors lie

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def rows(self) -> Tensor:
        """The original rows."""
        return self.keys.keys

    def searched(self) -> PreparedKeys:
        """What a search takes."""
        return self.keys

    @property
    def end(self) -> int:
        """The sequence number after the last row's."""
        return self.start + len(self)

    @property
    def held_bytes(self) -> int:
        """Bytes that are in memory and nowhere else."""
        if self.part is not None:
            own = self.keys.packed is not None and "packed" not in self.part.record.tensors
            return self.keys.nbytes if own else 0
        values = 0 if self.values is None else self.values.nbytes
        return self.keys.nbytes + self.rows.nbytes + self.ids.nbytes + values


class Tail:
    """The newest rows, in buffers with room."""

    part: ClassVar[None] = None  # no file has them

    def __init__(self, layout: Layout, start: int) -> None:
        self.layout = layout
        self.start = start
        self.count = 0
        self._room = 0
        self._packed: Tensor | None = None
        self._packed_rows = 0
        self._ids = RowIds()
        self._rows: Tensor
        self._values: Tensor | None
        self._set_room(0)

    def __len__(self) -> int:
        return self.count

    @property
    def end(self) -> int:
        """The sequence number after the last row's."""
        return self.start + self.count

    @property
    def rows(self) -> Tensor:
        """The rows that are there."""
        return self._rows[: self.count]

    @property
    def values(self) -> Tensor | None:
        """Their values."""
        return None if self._values is None else self._values[: self.count]

    @property
    def ids(self) -> RowIds:
        """Their ids."""
        listed = self._ids.listed
        return self._ids if listed is None else RowIds(listed=listed[: self.count])

    @property
    def is_full(self) -> bool:
        """Whether it is a chunk's worth of rows."""
        return self.count == self.layout.chunk_rows

    @property
    def held_bytes(self) -> int:
        """Bytes in memory."""
        values = 0 if self._values is None else self._values.nbytes
        codes = 0 if self._packed is None else self._packed.nbytes
        return self._rows.nbytes + values + codes + self._ids.nbytes

    def searched(self) -> Tensor | PreparedKeys:
        """What a search takes; only the first ``count`` rows count. Their codes serve if all have been packed."""
        if self._packed is None or self._packed_rows < self.count:
            return self.rows
        return PreparedKeys(self._rows, self._packed, self.layout.metric)

    def append(self, rows: Tensor, ids: int | Tensor, values: Tensor | None) -> int:
        """Take as many of the rows as fit, and say how many. ``ids``: of each, or the first of ids that count on."""
        taken = min(len(rows), self.layout.chunk_rows - self.count)
        if self.count + taken > self._room:
            self._set_room(self.layout.tail_rows(self.count + taken))
        here = slice(self.count, self.count + taken)
        self._rows[here] = rows[:taken]
        if self._values is not None:
            assert values is not None
            self._values[here] = values[:taken]
        self._append_ids(ids, here)
        self.count += taken
        return taken

    def shrink_to(self, count: int) -> None:
        """Forget the newest rows."""
        self.count = count
        self._packed_rows = min(self._packed_rows, count)

    @torch.inference_mode(False)
    def pack(self) -> None:
        """Bring the packed form up to date, where the kernels of the CPU serve: elsewhere the rows are searched."""
        if not self.layout.coded or self._packed_rows == self.count or not served_by_cpu(self._rows):
            return
        if self._packed is None:
            op = torch.ops.memad_fast.prepare_keys_with_room
            self._packed = op(self.rows, self._room, self.layout.metric)
        else:
            new = torch.arange(self._packed_rows, self.count)
            write(torch.ops.memad_fast.prepare_keys_rows_.default, self._packed, self._rows, new, self.layout.metric)
        self._packed_rows = self.count

    @torch.inference_mode(False)
    def to_chunk(self) -> Chunk:
        """The full tail as a chunk, packed around its mean."""
        return Chunk(self.start, self.layout.prepared(self.rows), self.ids, self.values)

    def _append_ids(self, ids: int | Tensor, here: slice) -> None:
        if isinstance(ids, int):
            if here.start == 0:
                self._ids = RowIds(ids)
            if self._ids.listed is None and self._ids.first + here.start == ids:
                return
            ids = torch.arange(ids, ids + here.stop - here.start, device=self.layout.device)
        if self._ids.listed is None:
            listed = torch.arange(self._room, device=self.layout.device) + self._ids.first
            self._ids = RowIds(listed=listed)
        assert self._ids.listed is not None
        self._ids.listed[here] = ids[: here.stop - here.start]

    @torch.inference_mode(False)  # buffers that are written in and out of inference mode
    def _set_room(self, room: int) -> None:
        layout = self.layout
        rows = torch.empty(room, layout.dim, dtype=layout.dtype, device=layout.device)
        values = None
        if layout.values_dim is not None:
            values = torch.empty(room, layout.values_dim, dtype=layout.values_dtype, device=layout.device)
        if self._room:
            rows[: self.count] = self.rows
            if values is not None:
                values[: self.count] = self._values[: self.count]  # type: ignore[index]
            if self._ids.listed is not None:
                listed = torch.empty(room, dtype=torch.int64, device=layout.device)
                listed[: self.count] = self._ids.listed[: self.count]
                self._ids = RowIds(listed=listed)
        self._rows, self._values, self._room = rows, values, room
        self._packed, self._packed_rows = None, 0


def some(values: np.ndarray, what: str = "id") -> str:
    """The first few of many, in words."""
    named = ", ".join(map(str, values[:MOST_NAMED].tolist()))
    more = f" and {len(values) - MOST_NAMED} more" if len(values) > MOST_NAMED else ""
    return f"{what}{'s' if len(values) > 1 else ''} {named}{more}"
