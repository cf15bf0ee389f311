"""The k nearest keys of each query, exactly: the read of every memory bank.

STCM reads the single nearest item (MemSTC-Net, eq. 6), PatchCore the nearest patch of its bank. The indices
are those of the float64 distances of the inputs; csrc/cpu/README_nearest_keys.md proves why int8 arithmetic can find
them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from memad_fast._arguments import METRICS, check_choice
from memad_fast._backend import serves_reference
from memad_fast._checks import check_float, check_like, check_rank, check_size
from memad_fast._library import call, define
from memad_fast.ops.prepare_keys import PreparedKeys, split_keys

# The reference works on blocks of at most this many float64 differences (32 MiB).
_REFERENCE_BLOCK = 1 << 22


def nearest_keys(
    query: Tensor, keys: Tensor | PreparedKeys, k: int = 1, *, metric: str = "l2"
) -> tuple[Tensor, Tensor]:
    """Find each query's k nearest keys, exactly.

    Args:
        query: ``[N, D]``. float32, float16, bfloat16, or float64 (by the reference).
        keys: ``[M, D]``, dtype and device of ``query``; or ``PreparedKeys`` of such keys.
        k: how many keys, 1 to M.
        metric: what is compared and returned, computed in float64 from the inputs as they are:

            - "l2": Σ(q−k)², smallest first;
            - "cosine": 1 − q·k / (‖q‖‖k‖) within [0, 2], smallest first; a zero vector has cosine 0, distance 1;
            - "ip": the inner product q·k itself, largest first.

    Returns:
        ``distances`` ``[N, k]`` float32 (float64 for float64): the value above, rounded once. An identical row
        has l2 and cosine distance exactly 0.
        ``indices`` ``[N, k]`` int64: best first, ties to the lowest index. Always the order of the float64
        values, whatever the dtype, batch split, number of threads or instruction set.

    A query with a NaN or an infinity gives distance NaN and index −1. A key with one is never returned; where fewer
    than k finite keys exist, the last slots are NaN and −1. N = 0 gives empty results. For D = 0 all values are equal,
    so the first k keys are returned.

    Gradients: distances, for query and keys; a slot with index −1 gives none, neither does cosine at a zero vector.
    Deterministic: summed in the order of the queries.

    Cost: 2·N·M·D operations on int8 codes, and float64 work only for the few keys that their error cannot rule out
    (``nearest_keys_stats`` counts them; all keys in the worst case: a bank of equal rows). A query that would need too
    many is screened again in float32 on a CPU, and computed with every key on a GPU. Memory O(N·k), never [N, M]:
    beside the results tiles of at most a few MiB a thread on a CPU; on a GPU 64 MiB, 64·N·k bytes more by "cuda", and
    by "triton" what 64 queries take if that is more: M / 4 bytes each.

    Raises:
        TypeError: a wrong type or dtype, or different dtypes.
        ValueError: a wrong shape, no keys, k outside [1, M], an unknown metric, or one that differs from the
            prepared keys'.

    Source: K. Zhou et al., "Memorizing Structure-Texture Correspondence for Image Anomaly Detection", eq. 6; K. Roth et
    al., "Towards Total Recall in Industrial Anomaly Detection" (PatchCore), the nearest patch of the bank.

    Example:
        >>> import torch, memad_fast
        >>> keys = torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 3.0]])
        >>> distances, indices = memad_fast.nearest_keys(torch.tensor([[3.0, 4.0]]), keys, k=2)
        >>> distances, indices
        (tensor([[0., 1.]]), tensor([[1, 2]]))
    """
    rows, packed = _check(query, keys, k, metric)
    if serves_reference("nearest_keys", query):
        return reference(query, rows, k, metric=metric)
    return call(torch.ops.memad_fast.nearest_keys, query, rows, packed, k, metric)


class NearestKeysStats(NamedTuple):
    """What a search had to do for each query (``nearest_keys_stats``)."""

    survivors: Tensor
    full_path: Tensor


def nearest_keys_stats(
    query: Tensor, keys: Tensor | PreparedKeys, k: int = 1, *, metric: str = "l2"
) -> NearestKeysStats:
    """Search as ``nearest_keys`` does, and tell how much of it the screen of int8 codes could not decide.

    Args:
        query: as in ``nearest_keys``: ``[N, D]``.
        keys: as in ``nearest_keys``: ``[M, D]`` or ``PreparedKeys``.
        k: as in ``nearest_keys``.
        metric: as in ``nearest_keys``.

    Returns:
        ``survivors`` ``[N]`` int64: how many keys were computed in float64. A few of M where the screen works; 0 for a
        query that is not finite.
        ``full_path`` ``[N]`` bool: whether codes left so many keys that the query was screened again in float32, or
        computed with every key (or, by Triton, with more than a sixteenth of them).

        The results of a search never depend on these numbers, its speed does. They are those of this call: the
        number of threads, the instruction set and whether keys are prepared change them. The reference computes all
        keys of every finite query.

    Many survivors mean that keys lie closer together than the codes can tell: a bank with duplicates, with a few
    dominant dimensions, or prepared keys whose rows were overwritten by ones far from the old mean (prepare again).

    Gradients: none. Cost: that of ``nearest_keys``.

    Raises:
        TypeError, ValueError: as ``nearest_keys``.

    Example:
        >>> import torch, memad_fast
        >>> stats = memad_fast.nearest_keys_stats(torch.zeros(2, 4), 100 * torch.eye(4))
        >>> stats.full_path
        tensor([False, False])
    """
    rows, packed = _check(query, keys, k, metric)
    if serves_reference("nearest_keys_stats", query):
        finite = query.isfinite().all(dim=1)
        return NearestKeysStats(finite * rows.shape[0], finite)
    return NearestKeysStats(*call(torch.ops.memad_fast.nearest_keys_stats, query, rows, packed, k, metric))


def _check(query: object, keys: object, k: object, metric: str) -> tuple[Tensor, Tensor | None]:
    """The original rows and the packed form of ``keys``, if they can be searched."""
    check_choice("metric", metric, METRICS)
    rows, packed = split_keys(keys, metric)
    check_search(query, rows)
    if isinstance(k, bool) or not isinstance(k, (int, torch.SymInt)):
        raise TypeError(f"k: expected an int, got {type(k).__name__}")
    if k < 1 or k > rows.shape[0]:
        raise ValueError(f"k: expected 1 to {rows.shape[0]} (the number of keys), got {k}")
    return rows, packed


def check_search(query: object, keys: Tensor) -> None:
    """``query`` can be searched in ``keys``, and there is a key."""
    check_float("query", query)
    assert isinstance(query, Tensor)
    check_rank("query", query, 2, "[N, D]")
    check_like("keys", keys, "query", query)
    check_size("keys", keys, 1, query.shape[1], "like query")
    if keys.shape[0] == 0:
        raise ValueError(f"keys: expected at least 1 row, got shape {tuple(keys.shape)}")


def values(query: Tensor, keys: Tensor, metric: str) -> Tensor:
    """What the metric compares, for rows that broadcast against each other, in float64: [..., D] -> [...]."""
    q, rows = query.double(), keys.double()
    if metric == "l2":
        return (q - rows).square().sum(-1)
    product = (q * rows).sum(-1)
    if metric == "ip":
        return product
    squares = q.square().sum(-1) * rows.square().sum(-1)
    is_zero = squares == 0
    cosine = torch.where(is_zero, 0.0, product / torch.where(is_zero, 1.0, squares).sqrt())
    # The value is clamped, its gradient is not.
    return 1.0 - (cosine + (cosine.clamp(-1.0, 1.0) - cosine).detach())


def reference(query: Tensor, keys: Tensor, k: int, *, metric: str = "l2") -> tuple[Tensor, Tensor]:
    """The definition, in plain torch: all values in float64, a stable sort. In blocks of bounded size."""
    result = torch.float64 if query.dtype == torch.float64 else torch.float32
    with torch.no_grad():
        indices = _search(query.detach(), keys.detach(), k, metric)
    found = keys[indices.clamp(min=0)]
    missing = indices < 0
    # Masked before the arithmetic, so that an infinity or a NaN elsewhere cannot reach a gradient.
    safe_query = torch.where(missing.all(dim=1)[:, None], 0.0, query)
    safe_keys = torch.where(missing[:, :, None], 0.0, found)
    distances = values(safe_query[:, None], safe_keys, metric)
    return torch.where(missing, torch.nan, distances).to(result), indices


def _search(query: Tensor, keys: Tensor, k: int, metric: str) -> Tensor:
    count, width = keys.shape
    key_block = max(1, min(count, _REFERENCE_BLOCK // max(width, 1)))
    query_block = max(1, _REFERENCE_BLOCK // max(width * key_block, count))
    unusable = ~keys.isfinite().all(dim=1)
    blocks = []
    for part in query.split(query_block):
        ranks = torch.cat([values(part[:, None], piece[None], metric) for piece in keys.split(key_block)], dim=1)
        ranks = -ranks if metric == "ip" else ranks
        ranks = ranks.masked_fill(unusable | ~part.isfinite().all(dim=1, keepdim=True), torch.nan)
        ordered, order = ranks.sort(dim=1, stable=True)  # NaN comes last
        blocks.append(torch.where(ordered[:, :k].isnan(), -1, order[:, :k]))
    return torch.cat(blocks) if blocks else query.new_empty(0, k, dtype=torch.int64)


def _fake(query: Tensor, keys: Tensor, packed: Tensor | None, k: int, metric: str) -> tuple[Tensor, Tensor]:
    count = query.shape[0]
    return query.new_empty(count, k, dtype=torch.float32), query.new_empty(count, k, dtype=torch.int64)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, keys, _, _, ctx.metric = inputs
    indices = output[1]
    ctx.mark_non_differentiable(indices)
    ctx.save_for_backward(query, keys, indices)


def _backward(ctx: Any, grad_distances: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    query, keys, indices = ctx.saved_tensors
    return (*search_gradients(ctx, grad_distances, query, keys, indices, ctx.metric), None, None, None)


def search_gradients(
    ctx: Any, grad_distances: Tensor, query: Tensor, keys: Tensor, indices: Tensor, metric: str
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients for query and keys (the first two inputs of the op), each only where it is needed."""
    arguments = (grad_distances, query, keys, indices, metric)
    grad_query = torch.ops.memad_fast.nearest_keys_backward_query(*arguments) if ctx.needs_input_grad[0] else None
    grad_keys = torch.ops.memad_fast.nearest_keys_backward_keys(*arguments) if ctx.needs_input_grad[1] else None
    return grad_query, grad_keys


define(
    "nearest_keys(Tensor query, Tensor keys, Tensor? packed, int k, str metric) -> (Tensor, Tensor)",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
define(
    "nearest_keys_stats(Tensor query, Tensor keys, Tensor? packed, int k, str metric) -> (Tensor, Tensor)",
    fake=lambda query, keys, packed, k, metric: (
        query.new_empty(query.shape[0], dtype=torch.int64),
        query.new_empty(query.shape[0], dtype=torch.bool),
    ),
)
define(
    "nearest_keys_backward_query(Tensor grad_distances, Tensor query, Tensor keys, Tensor indices, str metric)"
    " -> Tensor",
    fake=lambda grad_distances, query, keys, indices, metric: query.new_empty(query.shape),
)
define(
    "nearest_keys_backward_keys(Tensor grad_distances, Tensor query, Tensor keys, Tensor indices, str metric)"
    " -> Tensor",
    fake=lambda grad_distances, query, keys, indices, metric: keys.new_empty(keys.shape),
)
