"""Read of the structure-texture memory (MemSTC-Net, eq. 6): the value that belongs to the nearest key."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memad_fast._backend import serves_reference
from memad_fast._checks import FLOATS, check_float, check_rank, check_size
from memad_fast._library import call, define
from memad_fast.ops.nearest_keys import check_search, search_gradients
from memad_fast.ops.nearest_keys import reference as nearest_keys_reference
from memad_fast.ops.prepare_keys import PreparedKeys, split_keys


def stcm_lookup(
    query: Tensor, keys: Tensor | PreparedKeys, values: Tensor, *, filled: int | Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Nearest key (squared Euclidean distance) and its value, in one pass.

    Args:
        query: ``[N, D]``. float32, float16, bfloat16, or float64 (by the reference).
        keys: ``[M, D]``, dtype and device of ``query``; or ``PreparedKeys`` of such keys with metric "l2".
        values: ``[M, V]``, any of these dtypes (float64 only with a float64 query), device of ``query``.
        filled: only rows [0, filled) are searched: an int from 1 to M, or an int64 tensor with one element, whose
            value is read where the kernel runs, clamped to [0, M] (nothing waits for it). None searches all rows.

    Returns:
        ``read`` ``[N, V]``, dtype of ``values``: ``values[indices]``, bit for bit.
        ``distances`` ``[N]`` float32 (float64 for float64) and ``indices`` ``[N]`` int64 as ``nearest_keys`` gives
        them with k = 1.

    Where nothing is found (a non-finite query, no finite key, a tensor ``filled`` of 0), index is −1 and distance and
    read are NaN.

    Gradients: read for values, distances for query and keys. Deterministic: summed in the order of the queries.

    Cost: ``nearest_keys`` and N·V copies.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape or device, no keys, or an int ``filled`` outside [1, M].

    Source: K. Zhou et al., "Memorizing Structure-Texture Correspondence for Image Anomaly Detection", eq. 6.

    Example:
        >>> import torch, memad_fast
        >>> keys, values = torch.eye(3), torch.tensor([[10.0], [20.0], [30.0]])
        >>> memad_fast.stcm_lookup(torch.tensor([[0.0, 2.0, 0.0]]), keys, values)
        (tensor([[20.]]), tensor([1.]), tensor([1]))
    """
    rows, packed = split_keys(keys, "l2")
    check_search(query, rows)
    check_float("values", values)
    check_rank("values", values, 2, "[M, V]")
    check_size("values", values, 0, rows.shape[0], "like keys")
    if values.device != query.device:
        raise ValueError(f"values: expected device {query.device} like query, got {values.device}")
    limit = _limit(filled, rows)
    if serves_reference("stcm_lookup", query):
        return reference(query, rows, values, limit)
    if values.dtype not in FLOATS[:3]:
        raise TypeError(f"values: expected float32, float16 or bfloat16 with a {query.dtype} query, got {values.dtype}")
    return call(torch.ops.memad_fast.stcm_lookup, query, rows, values, packed, limit)


def _limit(filled: int | Tensor | None, keys: Tensor) -> Tensor | None:
    """``filled`` as a tensor, so that one op serves both."""
    if filled is None:
        return None
    if isinstance(filled, Tensor):
        if filled.dtype != torch.int64:
            raise TypeError(f"filled: expected torch.int64, got {filled.dtype}")
        if filled.numel() != 1:
            raise ValueError(f"filled: expected one element, got shape {tuple(filled.shape)}")
        if filled.device != keys.device:
            raise ValueError(f"filled: expected device {keys.device} like keys, got {filled.device}")
        return filled
    if isinstance(filled, bool) or not isinstance(filled, (int, torch.SymInt)):
        raise TypeError(f"filled: expected an int or a tensor, got {type(filled).__name__}")
    if filled < 1 or filled > keys.shape[0]:
        raise ValueError(f"filled: expected 1 to {keys.shape[0]} (the number of keys), got {filled}")
    return torch.full((), filled, dtype=torch.int64, device=keys.device)


def reference(
    query: Tensor, keys: Tensor, values: Tensor, filled: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, in plain torch. Rows that are not filled are searched as non-finite keys: never returned."""
    if filled is not None:
        unused = torch.arange(keys.shape[0], device=keys.device)[:, None] >= filled.reshape(())
        keys = torch.where(unused, torch.nan, keys)
    distances, indices = nearest_keys_reference(query, keys, 1)
    index = indices[:, 0]
    read = torch.where((index < 0)[:, None], torch.nan, values[index.clamp(min=0)])
    return read, distances[:, 0], index


def _fake(
    query: Tensor, keys: Tensor, values: Tensor, packed: Tensor | None, filled: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    count = query.shape[0]
    return (
        values.new_empty(count, values.shape[1]),
        query.new_empty(count, dtype=torch.float32),
        query.new_empty(count, dtype=torch.int64),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    query, keys, values, _, _ = inputs
    indices = output[2]
    ctx.mark_non_differentiable(indices)
    ctx.save_for_backward(query, keys, values, indices)


def _backward(ctx: Any, grad_read: Tensor, grad_distances: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    query, keys, values, indices = ctx.saved_tensors
    grads = search_gradients(ctx, grad_distances[:, None], query, keys, indices[:, None], "l2")
    grad_values = None
    if ctx.needs_input_grad[2]:
        grad_values = torch.ops.memad_fast.stcm_lookup_backward_values(grad_read, values, indices)
    return (*grads, grad_values, None, None)


define(
    "stcm_lookup(Tensor query, Tensor keys, Tensor values, Tensor? packed, Tensor? filled) -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
define(
    "stcm_lookup_backward_values(Tensor grad_read, Tensor values, Tensor indices) -> Tensor",
    fake=lambda grad_read, values, indices: values.new_empty(values.shape),
)
