"""Top-k memory read with Gumbel noise (SimSID's space-aware memory; the "Gumbel shrinkage" of SQUID and SimSID).

score_ij = query_i · memory_j + g_ij;  the k largest scores of each row choose the memory rows that make its read.
The weights of the soft reads are softmax_j(score_ij / temperature), the Gumbel-softmax of Jang, Gu, Poole (ICLR 2017).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memad_fast._arguments import check_noise_options, check_seed
from memad_fast._backend import serves_reference
from memad_fast._checks import check_float, check_like, check_rank, check_size
from memad_fast._library import call, define
from memad_fast._noise import gumbel_noise


def gumbel_topk(
    query: Tensor,
    memory: Tensor,
    k: int,
    *,
    temperature: float = 1.0,
    seed: int | Tensor | None = None,
    noise: bool = True,
    combine: str = "sum",
) -> tuple[Tensor, Tensor, Tensor]:
    """Read, for each query, the k memory rows with the largest inner product plus Gumbel noise.

    Args:
        query: ``[N, D]``; float32, float16, bfloat16, or float64 (by the reference).
        memory: ``[M, D]``, dtype and device of ``query``.
        k: rows read by each query, 1 to M.
        temperature: divides the scores inside the softmax that makes the weights of the soft reads, > 0. It changes
            neither which rows are chosen nor the scores returned, and has no effect for "sum" and "mean".
        seed: of the noise: an int in [−2⁶³, 2⁶³), an int64 0-dimensional tensor on the device of ``query``, or
            ``None``: drawn from torch's generator, so that ``torch.manual_seed`` reproduces it.
        noise: ``False`` reads without noise, deterministically, and ignores ``seed``.
        combine: how the chosen rows make the read; w = softmax over all M of score / temperature:

            * "sum": their sum.
            * "mean": their mean.
            * "softmax": Σ w·row over the chosen rows; the weights of the other rows are dropped.
            * "renormalized": Σ w·row / Σ w over the chosen rows.
            * "straight_through": the value of "renormalized", the gradient of the dense read w · memory.

    Returns:
        ``read`` ``[N, D]`` like ``query``.
        ``indices`` ``[N, k]`` int64, by descending score, ties to the lowest index.
        ``scores`` ``[N, k]`` float32 (float64 for float64): query · memory + noise.

    The noise is Philox4x32-10 keyed by the seed and counted by (row, column): the same float32 bits on every backend,
    whatever the tiling (``memad_fast._noise`` defines it). Rows count from 0 in each call: a batch cut in two draws
    other noise for its second part. Without noise the result of a row does not depend on the batch it came in.

    A query row with a NaN or an infinity reads NaN, with indices −1 and scores NaN. A memory row with one is never
    chosen and has no weight; nor has one whose score is −inf or NaN because the product overflows float32 (+inf is the
    largest score, and makes soft weights NaN). With fewer than k rows to choose from, the remaining slots have index −1
    and score NaN and add nothing ("mean" divides by the rows found; with none the read is 0).

    Gradients: for ``query`` and ``memory``, through ``read`` and ``scores``; noise and choice are constants. In "sum"
    and "mean" the memory gets the read's gradient at the chosen rows and the query gets none from the read. The
    published SQUID and SimSID code keeps the weights strictly above the k-th largest, so it is this op with k − 1,
    "straight_through" and ``noise=False`` (up to ties, and to the gradient of ``memory`` as the summed values, where
    that code weighs by the sparse instead of the dense weights). Deterministic; nothing of size N·M is stored, the
    backward recomputes scores and noise.

    Cost: N·M·D multiply-adds and N·M random words ("softmax": noise values). Memory: a packed float32 copy of
    ``memory`` and the outputs; with so few queries that one pass over ``memory`` serves them all, 64 packed rows a
    thread instead.
    The backward of "softmax" and "straight_through" makes three and five products, and keeps three float32 copies of
    ``memory`` and at most the larger of 8 MiB and 384·M bytes of scores.
    On a GPU: 128 KiB a multiprocessor, 64 MiB (at least 64 rows of 8·M bytes) for k > 64 and in that backward.

    Raises:
        TypeError: a tensor argument is no floating tensor, dtypes differ, ``k`` or ``seed`` is not an integer.
        ValueError: shapes or devices do not fit, ``k`` is not in 1 to M, ``temperature`` is not positive and finite,
            ``seed`` is out of range, or ``combine`` is unknown.

    Source: the SimSID report, "Space-aware memory" (scores, noise, top-k, unweighted sum); T. Xiang et al., "SQUID:
    Deep Feature In-Painting for Unsupervised Anomaly Detection", CVPR 2023, section 3.3 (Gumbel shrinkage).

    Example:
        >>> import torch, memad_fast
        >>> memory = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]])
        >>> read, indices, scores = memad_fast.gumbel_topk(torch.tensor([[1.0, 0.5]]), memory, 2, noise=False)
        >>> read.tolist(), indices.tolist(), scores.tolist()
        ([[3.0, 0.0]], [[2, 0]], [[2.0, 1.0]])
    """
    check_float("query", query)
    check_rank("query", query, 2, "[N, D]")
    check_float("memory", memory)
    check_rank("memory", memory, 2, "[M, D]")
    check_like("memory", memory, "query", query)
    check_size("memory", memory, 1, query.shape[1], "like query")
    if not isinstance(k, int):
        raise TypeError(f"k: expected an int, got {type(k).__name__}")
    if not 1 <= k <= memory.shape[0]:
        raise ValueError(f"k: expected 1 to {memory.shape[0]}, the number of memory rows, got {k}")
    check_noise_options(temperature, combine)
    seed = _seed_tensor(seed, query.device) if noise else None
    if serves_reference("gumbel_topk", query):
        return reference(query, memory, k, temperature, seed, combine)
    return call(torch.ops.memad_fast.gumbel_topk, query, memory, k, temperature, seed, combine)


def _seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor:
    if seed is None:
        return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"seed: expected an int64 tensor, got {seed.dtype}")
        if seed.dim() != 0:
            raise ValueError(f"seed: expected 0 dimensions, got shape {tuple(seed.shape)}")
        if seed.device != device:
            raise ValueError(f"seed: expected device {device} like query, got {seed.device}")
        return seed
    if not isinstance(seed, int):
        raise TypeError(f"seed: expected an int, an int64 tensor or None, got {type(seed).__name__}")
    check_seed(seed)
    return torch.full((), seed, dtype=torch.int64, device=device)


def reference(
    query: Tensor, memory: Tensor, k: int, temperature: float, seed: Tensor | None, combine: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, in plain torch: the whole score matrix, a stable sort, gathered rows. Any device, float64 too.

    ``seed`` ``None`` means no noise.
    """
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    finite_query = query.isfinite().all(dim=1, keepdim=True)
    finite_memory = memory.isfinite().all(dim=1)
    rows = torch.where(finite_memory[:, None], memory, 0.0).to(wide)
    scores = torch.where(finite_query, query, 0.0).to(wide) @ rows.T
    if seed is not None:
        scores = scores + gumbel_noise(seed, *scores.shape)
    scores = torch.where(finite_memory & ~scores.isnan(), scores, -torch.inf)

    ranked, order = scores.detach().sort(dim=1, descending=True, stable=True)
    indices = order[:, :k]
    found = ranked[:, :k] > -torch.inf
    chosen = scores.gather(1, indices)
    if combine == "sum":
        weights = found.to(wide)
    elif combine == "mean":
        weights = found / found.sum(dim=1, keepdim=True).clamp(min=1).to(wide)
    elif combine == "softmax":
        weights = _softmax(scores, temperature).gather(1, indices)
    else:
        weights = _softmax(chosen, temperature)
    # Weights spread over M columns: one product then makes the read, without an [N, k, D] gather.
    read = torch.zeros_like(scores).scatter(1, indices, torch.where(found, weights, 0.0)) @ rows
    if combine == "straight_through":
        dense = _softmax(scores, temperature) @ rows
        read = read.detach() + (dense - dense.detach())
    return (
        torch.where(finite_query, read, torch.nan).to(query.dtype),
        torch.where(finite_query & found, indices, -1),
        torch.where(finite_query & found, chosen, torch.nan),
    )


def _softmax(scores: Tensor, temperature: float) -> Tensor:
    """Softmax of each row of scores / temperature; scores of −inf weigh 0, also where a row has nothing else."""
    usable = scores > -torch.inf
    nothing = ~usable.any(dim=1, keepdim=True)
    weights = (torch.where(nothing, 0.0, scores) / temperature).softmax(dim=1)
    return torch.where(usable, weights, 0.0)


def _fake(
    query: Tensor, memory: Tensor, k: int, temperature: float, seed: Tensor | None, combine: str
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (query.shape[0], k)
    read = torch.empty_like(query, memory_format=torch.contiguous_format)
    return read, query.new_empty(shape, dtype=torch.int64), query.new_empty(shape, dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, memory, _, ctx.temperature, seed, ctx.combine = inputs
    _, indices, scores = output
    ctx.save_for_backward(query, memory, seed, indices, scores)


def _backward(ctx: Any, grad_read: Tensor, _: Tensor, grad_scores: Tensor) -> tuple[Tensor | None, ...]:
    query, memory, seed, indices, scores = ctx.saved_tensors
    grad_query, grad_memory = torch.ops.memad_fast.gumbel_topk_backward(
        grad_read, grad_scores, query, memory, ctx.temperature, seed, ctx.combine, indices, scores
    )
    return grad_query, grad_memory, None, None, None, None


def _fake_backward(
    grad_read: Tensor,
    grad_scores: Tensor,
    query: Tensor,
    memory: Tensor,
    temperature: float,
    seed: Tensor | None,
    combine: str,
    indices: Tensor,
    scores: Tensor,
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(query, memory_format=torch.contiguous_format),
        torch.empty_like(memory, memory_format=torch.contiguous_format),
    )


define(
    "gumbel_topk(Tensor query, Tensor memory, int k, float temperature, Tensor? seed, str combine)"
    " -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
define(
    "gumbel_topk_backward(Tensor grad_read, Tensor grad_scores, Tensor query, Tensor memory, float temperature,"
    " Tensor? seed, str combine, Tensor indices, Tensor scores) -> (Tensor, Tensor)",
    fake=_fake_backward,
)
