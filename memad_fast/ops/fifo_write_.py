"""Ring write of the structure-texture memory (MemSTC-Net, eq. 7): new pairs replace the oldest, in place."""

from __future__ import annotations

import torch
from torch import Tensor

from memad_fast._backend import serves_reference
from memad_fast._checks import check_float, check_like, check_rank, check_size, check_tensor
from memad_fast._library import define, write


def fifo_write_(keys: Tensor, values: Tensor, cursor: Tensor, new_keys: Tensor, new_values: Tensor) -> None:
    """Write n new key-value pairs at the cursor of a ring memory, in place, and advance the cursor.

    Row i of the new pairs goes to slot (cursor + i) mod M. Of more new rows than slots the newest M stay, where a
    row-by-row write would have left them.

    Args:
        keys: ``[M, D]``, M ≥ 1, written in place. Any strides, but no two elements may share memory.
        values: ``[M, V]``, likewise; its dtype may differ from that of ``keys``.
        cursor: int64 with one element: the slot of the oldest pair, next to be written. Any value counts modulo M;
            afterwards it is (cursor + n) mod M.
        new_keys: ``[n, D]``, dtype and device of ``keys``. Must not overlap them.
        new_values: ``[n, V]``, dtype and device of ``values``. Must not overlap them.

    Gradients: none. The write is not recorded, so neither ``keys`` nor ``values`` may require a gradient while
    gradients are enabled; new rows are taken as they are. A backward that needs the overwritten rows (of an earlier
    read of this memory) is an error, as after any in-place op: call backward before the write, or read a clone.

    Cost: one copy of the new rows. Nothing waits for the cursor's value.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape or device, no slots, elements of ``keys`` or ``values`` that share memory, or a
            gradient required.

    Source: K. Zhou et al., "Memorizing Structure-Texture Correspondence for Image Anomaly Detection", eq. 7.

    Example:
        >>> import torch, memad_fast
        >>> keys, values, cursor = torch.zeros(3, 1), torch.zeros(3, 1), torch.tensor(2)
        >>> memad_fast.fifo_write_(keys, values, cursor, torch.tensor([[1.0], [2.0]]), torch.tensor([[5.0], [6.0]]))
        >>> keys.T, values.T, cursor
        (tensor([[2., 0., 1.]]), tensor([[6., 0., 5.]]), tensor(1))
    """
    check_float("keys", keys)
    check_rank("keys", keys, 2, "[M, D]")
    if keys.shape[0] == 0:
        raise ValueError(f"keys: expected at least 1 row, got shape {tuple(keys.shape)}")
    check_float("values", values)
    check_rank("values", values, 2, "[M, V]")
    check_size("values", values, 0, keys.shape[0], "like keys")
    if values.device != keys.device:
        raise ValueError(f"values: expected device {keys.device} like keys, got {values.device}")
    check_tensor("cursor", cursor)
    if cursor.dtype != torch.int64:
        raise TypeError(f"cursor: expected torch.int64, got {cursor.dtype}")
    if cursor.numel() != 1:
        raise ValueError(f"cursor: expected one element, got shape {tuple(cursor.shape)}")
    if cursor.device != keys.device:
        raise ValueError(f"cursor: expected device {keys.device} like keys, got {cursor.device}")
    _check_rows("keys", keys, new_keys, "[n, D]")
    _check_rows("values", values, new_values, "[n, V]")
    check_size("new_values", new_values, 0, new_keys.shape[0], "like new_keys")
    if serves_reference("fifo_write_", keys):
        reference(keys, values, cursor, new_keys, new_values)
    else:
        write(torch.ops.memad_fast.fifo_write_.default, keys, values, cursor, new_keys, new_values)


def _check_rows(name: str, ring: Tensor, new: Tensor, layout: str) -> None:
    """``new`` can be written to ``ring``, the argument ``name``."""
    check_tensor(f"new_{name}", new)
    check_rank(f"new_{name}", new, 2, layout)
    check_like(f"new_{name}", new, name, ring)
    check_size(f"new_{name}", new, 1, ring.shape[1], f"like {name}")
    if _shares_elements(ring):
        raise ValueError(f"{name}: expected elements with memory of their own, got strides {ring.stride()}")
    if ring.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: expected a tensor without gradient (or torch.no_grad()), got requires_grad=True")


def _shares_elements(matrix: Tensor) -> bool:
    """True if two elements of a [rows, cols] view may lie on the same memory."""
    if matrix.is_contiguous():
        return False
    (rows, cols), (row, col) = matrix.shape, matrix.stride()
    if rows <= 1 and cols <= 1:
        return False
    if rows <= 1:
        return col == 0
    if cols <= 1:
        return row == 0
    row_major = col > 0 and row > col * (cols - 1)
    column_major = row > 0 and col > row * (rows - 1)
    return not (row_major or column_major)


def reference(keys: Tensor, values: Tensor, cursor: Tensor, new_keys: Tensor, new_values: Tensor) -> None:
    """The definition, in plain torch."""
    new_keys, new_values = new_keys.detach(), new_values.detach()
    slots, count = keys.shape[0], new_keys.shape[0]
    kept = min(count, slots)
    rows = (cursor.reshape(1) + torch.arange(count - kept, count, device=keys.device)) % slots
    keys.index_copy_(0, rows, new_keys[count - kept :])
    values.index_copy_(0, rows, new_values[count - kept :])
    cursor.add_(count).remainder_(slots)


define(
    "fifo_write_(Tensor(a!) keys, Tensor(b!) values, Tensor(c!) cursor, Tensor new_keys, Tensor new_values) -> ()",
    fake=lambda keys, values, cursor, new_keys, new_values: None,
)
