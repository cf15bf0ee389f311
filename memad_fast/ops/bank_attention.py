"""Thresholded attention over partitioned memory banks (PMB, section III-B, eq. 2-5; MemAE's read is a special case).

s_j = cos(q, m_j);  w = softmax(s / temperature);  w_j = max(w_j - t, 0);  read = sum_j w_j m_j, per partition.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from memad_fast._arguments import check_attention_options
from memad_fast._backend import serves_reference
from memad_fast._checks import check_float, check_like, check_rank, check_size
from memad_fast._library import call, define

# Vectors are divided by max(norm, NORM_FLOOR), the rule of torch.nn.functional.normalize.
NORM_FLOOR = 1e-12
# L1 renormalisation divides by max(sum, SUM_FLOOR): an all-zero row stays zero.
SUM_FLOOR = 1e-12
# A weight counts as above the threshold t when it exceeds t * (1 + TIE_BAND), about eight float32 roundings. Equal
# similarities with t = 1/M put every weight exactly on the threshold; without the band, rounding would decide.
TIE_BAND = 2.0**-20


class BankAttentionStats(NamedTuple):
    """What ``bank_attention`` does with its weights, per partition."""

    dead_share: Tensor
    """``[P]``: share of the query rows whose shrunk weights are all zero (their read is zero), in [0, 1]."""
    entropy: Tensor
    """``[P]``: mean entropy of the softmax weights before shrinking, in nats, from 0 to log(M)."""


def bank_attention(
    query: Tensor,
    bank: Tensor,
    *,
    threshold: float,
    shrink: str = "soft",
    renormalize: bool = False,
    similarity: str = "cosine",
    temperature: float = 1.0,
) -> Tensor:
    """Read each partition's memory bank by softmax attention with thresholded weights.

    For a query row q of partition p: s_j = similarity(q, bank[p, j]), w = softmax over the M items of s / temperature,
    shrink, renormalise if asked, read = Σ_j w_j · bank[p, j] (the items as they are, not normalised).

    Args:
        query: ``[..., P, C, D]``, C query rows for each of P partitions; any number of leading dimensions. Any strides
            with a contiguous last dimension are read in place (others are made contiguous): a feature map
            ``x [B, C, h, w]`` is cut along h into P strips, one query per channel, without a copy by
            ``x.view(B, C, P, h // P * w).transpose(1, 2)``. float32, float16, bfloat16, or float64 (by the reference).
        bank: ``[P, M, D]``, M ≥ 1 items for each partition; dtype and device like ``query``.
        threshold: t ≥ 0, finite; PMB uses 1/M, MemAE 0.0025. Weights lie in [0, 1].
        shrink: "soft" w = max(w - t, 0) (PMB, eq. 4); "hard" w where w > t, else 0 (MemAE); "none" w.
        renormalize: divide each row of weights by max(Σ|w|, 1e-12). A row of zeros stays zero.
        similarity: "cosine" (vectors are divided by max(norm, 1e-12), so a zero vector has similarity 0) or "dot".
        temperature: > 0, finite; the similarities are divided by it.

    Returns:
        ``[..., P, C, D]`` of ``query``'s dtype, accumulated in float32. The strides are those of
        ``torch.empty_like(query)`` as long as they leave the last dimension contiguous, else contiguous: the read of
        a feature map cut as above becomes a feature map again by ``read.transpose(1, 2).reshape(B, C, h, w)``, without
        a copy.

    A weight is above the threshold if it exceeds t by more than one part in 2^20: equal similarities with t = 1/M give
    weights of zero (a "dead" row) whatever the rounding. ``bank_attention_stats`` counts them.

    A query row with a NaN or an infinity reads NaN, other rows are not touched by it. A bank item with one enters the
    softmax of its partition: all reads of that partition are NaN, other partitions are not touched.

    Gradients: for ``query`` and ``bank``, exact, of the active branch at the thresholds; the backward recomputes the
    weights. A vector of norm ≤ 1e-12 gets no gradient through its cosine (its direction is not defined). Not
    differentiable in ``threshold`` and ``temperature``. The same bits for any thread count, and, for reads and
    gradients of ``query``, for any split of the rows.

    Cost: 4·rows·M·D floating-point operations forward, 10·rows·M·D backward. No weights are stored: memory beyond the
    result is O(M + D) for each thread and row tile plus, per thread, at most 8 MiB of packed items; in the backward
    also partial bank gradients of at most 32 MiB in all or the size of one bank.

    Raises:
        TypeError: ``query`` or ``bank`` is not a floating tensor, or their dtypes differ.
        ValueError: wrong rank, sizes or device, an empty bank, an unknown ``shrink`` or ``similarity``, ``threshold``
            negative or not finite, ``temperature`` not positive or not finite.

    Source: P. Xing, Z. Li, "Visual Anomaly Detection via Partition Memory Bank Module and Error Estimation",
    section III-B, eq. 2-5 (both sides of the cosine normalised). D. Gong et al., "Memorizing Normality to Detect
    Anomaly" (MemAE): ``similarity="dot", shrink="hard", threshold=0.0025, renormalize=True`` with P = 1, C = N.

    Example:
        >>> import torch, memad_fast
        >>> bank = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
        >>> query = torch.tensor([[[9.0, 0.0], [1.0, 1.0]]])
        >>> memad_fast.bank_attention(query, bank, threshold=1 / 2)
        tensor([[[0.2311, 0.0000],
                 [0.0000, 0.0000]]])
    """
    _check(query, bank, threshold, shrink, similarity, temperature)
    if serves_reference("bank_attention", query):
        return reference(query, bank, threshold, shrink, renormalize, similarity, temperature)
    return call(
        torch.ops.memad_fast.bank_attention, query, bank, threshold, shrink, renormalize, similarity, temperature
    )


def bank_attention_stats(
    query: Tensor,
    bank: Tensor,
    *,
    threshold: float,
    shrink: str = "soft",
    similarity: str = "cosine",
    temperature: float = 1.0,
) -> BankAttentionStats:
    """Count the dead rows of ``bank_attention`` and measure how evenly its weights spread.

    Args:
        query: as in ``bank_attention``: ``[..., P, C, D]``.
        bank: as in ``bank_attention``: ``[P, M, D]``.
        threshold: as in ``bank_attention``.
        shrink: as in ``bank_attention``; with "none" no row is dead.
        similarity: as in ``bank_attention``.
        temperature: as in ``bank_attention``.

    Returns:
        ``dead_share`` ``[P]``: share of the rows whose shrunk weights are all zero, counted exactly.
        ``entropy`` ``[P]``: mean over the rows of -Σ w·log(w), w the softmax weights before shrinking, in nats.
        Both float32 (float64 for float64), over the leading dimensions and C. NaN where there are no rows. A row whose
        weights are NaN is not dead, and makes the entropy of its partition NaN.

    Gradients: none. Cost: 2·rows·M·D floating-point operations; no weights are stored.

    Raises:
        TypeError, ValueError: as ``bank_attention``.

    Source: as ``bank_attention``. With the literal soft threshold 1/M, equal similarities give a dead row.

    Example:
        >>> import torch, memad_fast
        >>> bank = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
        >>> query = torch.tensor([[[9.0, 0.0], [1.0, 1.0]]])
        >>> memad_fast.bank_attention_stats(query, bank, threshold=1 / 2).dead_share
        tensor([0.5000])
    """
    _check(query, bank, threshold, shrink, similarity, temperature)
    if serves_reference("bank_attention_stats", query):
        return reference_stats(query, bank, threshold, shrink, similarity, temperature)
    return BankAttentionStats(
        *call(torch.ops.memad_fast.bank_attention_stats, query, bank, threshold, shrink, similarity, temperature)
    )


def _check(query: object, bank: object, threshold: float, shrink: str, similarity: str, temperature: float) -> None:
    check_float("query", query)
    check_float("bank", bank)
    assert isinstance(query, Tensor)
    assert isinstance(bank, Tensor)
    if query.dim() < 3:
        raise ValueError(f"query: expected at least 3 dimensions [..., P, C, D], got shape {tuple(query.shape)}")
    check_rank("bank", bank, 3, "[P, M, D]")
    check_like("bank", bank, "query", query)
    check_size("bank", bank, 0, query.shape[-3], "partitions like query")
    check_size("bank", bank, 2, query.shape[-1], "values an item like query")
    if bank.shape[1] == 0:
        raise ValueError(f"bank: expected at least 1 item in each partition, got shape {tuple(bank.shape)}")
    check_attention_options(threshold, shrink, similarity, temperature)


def reference(
    query: Tensor,
    bank: Tensor,
    threshold: float,
    shrink: str = "soft",
    renormalize: bool = False,
    similarity: str = "cosine",
    temperature: float = 1.0,
) -> Tensor:
    """The definition, in plain torch; weights are stored. float32 for the 16-bit types."""
    weights = _shrunk(_softmax_weights(query, bank, similarity, temperature), threshold, shrink)
    if renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=SUM_FLOOR)
    return (weights @ bank.to(weights.dtype)).to(query.dtype)


def reference_stats(
    query: Tensor, bank: Tensor, threshold: float, shrink: str, similarity: str, temperature: float
) -> BankAttentionStats:
    """The definition of the statistics, in plain torch; weights are stored."""
    with torch.no_grad():
        weights = _softmax_weights(query, bank, similarity, temperature)
        dead = (_shrunk(weights, threshold, shrink) == 0).all(dim=-1)
        entropy = -torch.xlogy(weights, weights).sum(dim=-1)
        rows = (*range(query.dim() - 3), -1)
        mean_entropy = entropy.double().mean(dim=rows).to(weights.dtype)
        return BankAttentionStats(dead.double().mean(dim=rows).to(weights.dtype), mean_entropy)


def _softmax_weights(query: Tensor, bank: Tensor, similarity: str, temperature: float) -> Tensor:
    """``[..., P, C, M]``, before shrinking; NaN for rows and partitions with a non-finite value."""
    wide = torch.promote_types(query.dtype, torch.float32)
    rows, items = query.to(wide), bank.to(wide)
    finite = items.detach().isfinite().all(dim=-1)[:, None, :] & rows.detach().isfinite().all(dim=-1)[..., None]
    if similarity == "cosine":
        rows, items = _normalized(rows), _normalized(items)
    scores = torch.where(finite, rows @ items.transpose(-1, -2) / temperature, torch.nan)
    return scores.softmax(dim=-1)


def _normalized(vectors: Tensor) -> Tensor:
    """Vectors over max(norm, floor); no gradient for those at the floor."""
    norm = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    unit = vectors / norm.clamp(min=NORM_FLOOR)
    return torch.where(norm > NORM_FLOOR, unit, unit.detach())


def _shrunk(weights: Tensor, threshold: float, shrink: str) -> Tensor:
    if shrink == "none":
        return weights
    kept = weights - threshold if shrink == "soft" else weights
    # 0 · w, not 0: a NaN stays a NaN.
    return torch.where(weights > threshold * (1.0 + TIE_BAND), kept, 0.0 * weights)


def _empty_rows_like(query: Tensor) -> Tensor:
    """A fresh tensor in the layout of the result: like ``query`` where its last dimension stays contiguous."""
    if query.shape[-1] <= 1 or query.stride(-1) == 1:
        result = torch.empty_like(query)
        if query.shape[-1] <= 1 or result.stride(-1) == 1:
            return result
    return torch.empty_like(query, memory_format=torch.contiguous_format)


def _fake(
    query: Tensor,
    bank: Tensor,
    threshold: float,
    shrink: str,
    renormalize: bool,
    similarity: str,
    temperature: float,
) -> Tensor:
    return _empty_rows_like(query)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, bank, *ctx.options = inputs
    ctx.save_for_backward(query, bank)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    query, bank = ctx.saved_tensors
    grad_query, grad_bank = torch.ops.memad_fast.bank_attention_backward(grad, query, bank, *ctx.options)
    return grad_query, grad_bank, None, None, None, None, None


def _fake_backward(grad: Tensor, query: Tensor, bank: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return _empty_rows_like(query), torch.empty_like(bank, memory_format=torch.contiguous_format)


def _fake_stats(query: Tensor, bank: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    dead_share = query.new_empty(query.shape[-3], dtype=torch.float32)
    return dead_share, torch.empty_like(dead_share)


define(
    "bank_attention(Tensor query, Tensor bank, float threshold, str shrink, bool renormalize, str similarity,"
    " float temperature) -> Tensor",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
define(
    "bank_attention_backward(Tensor grad, Tensor query, Tensor bank, float threshold, str shrink, bool renormalize,"
    " str similarity, float temperature) -> (Tensor, Tensor)",
    fake=_fake_backward,
)
define(
    "bank_attention_stats(Tensor query, Tensor bank, float threshold, str shrink, str similarity, float temperature)"
    " -> (Tensor, Tensor)",
    fake=_fake_stats,
)
