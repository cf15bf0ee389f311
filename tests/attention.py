"""Reads of memory banks and what "near" means for them, for the tests of bank_attention on every device."""

from __future__ import annotations

from typing import Any

import torch
from carried import on
from torch import Tensor

import memad_fast
from memad_fast.ops.bank_attention import reference

MODES = [
    (shrink, renormalize, similarity)
    for shrink in ("soft", "hard", "none")
    for renormalize in (False, True)
    for similarity in ("cosine", "dot")
]
# (query shape, M): one row, sizes around the lanes and the row blocks, several leading dimensions, more depth than one
# slice on either side, a bank that is packed slice by slice.
SHAPES = [
    ((1, 1, 1), 1),
    ((2, 3, 4, 5), 6),
    ((2, 2, 1, 3, 33), 16),
    ((3, 2, 70, 33), 150),
    ((1, 130, 200), 37),
    ((2, 2, 9, 64), 300),
    ((1, 3, 1024), 1100),
]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def inputs(shape: tuple[int, ...], items: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A query whose rows lean to some items, so that weights lie on both sides of 1 / M."""
    bank = torch.randn(shape[-3], items, shape[-1])
    query = torch.randn(shape) + bank[:, torch.arange(shape[-2]) % items]
    return query.to(dtype), bank.to(dtype)


def options(items: int, mode: tuple[str, bool, str], width: int) -> dict[str, Any]:
    shrink, renormalize, similarity = mode
    return {
        "threshold": 1 / items,
        "shrink": shrink,
        "renormalize": renormalize,
        "similarity": similarity,
        "temperature": 0.5 if similarity == "cosine" else 0.5 + 0.4 * width,
    }


def away_from_kinks(query: Tensor, bank: Tensor, chosen: dict[str, Any]) -> dict[str, Any]:
    """The same options with the threshold moved into the widest gap between the weights near it."""
    rows, items = query.double(), bank.double()
    if chosen["similarity"] == "cosine":
        rows, items = torch.nn.functional.normalize(rows, dim=-1), torch.nn.functional.normalize(items, dim=-1)
    weights = (rows @ items.transpose(-1, -2) / chosen["temperature"]).softmax(-1).flatten().sort().values
    near = weights[(weights > 0.7 * chosen["threshold"]) & (weights < 1.3 * chosen["threshold"])]
    if len(near) < 2:
        return chosen
    widest = near.diff().argmax()
    return {**chosen, "threshold": float(near[widest : widest + 2].mean())}


def assert_near(got: Tensor, expected: Tensor, tolerance: float) -> None:
    """Absolute, relative to the largest expected value: reads and gradients are sums that may cancel."""
    finite = expected[expected.isfinite()].abs()
    atol = tolerance * max(0.05, finite.max().item() if len(finite) else 0.0)
    torch.testing.assert_close(got.double(), expected.double(), rtol=0, atol=atol, equal_nan=True)


def assert_gradients_match(
    query: Tensor, bank: Tensor, chosen: dict[str, Any], tolerance: float, device: str = "cpu"
) -> None:
    """The read and both gradients are those of the definition in float64."""
    upstream = torch.randn(query.shape).to(query.dtype)
    results = []
    for q, b, call in (
        (query.clone(), bank.clone(), on(device, memad_fast.bank_attention)),
        (query.double(), bank.double(), reference),
    ):
        q.requires_grad_()
        b.requires_grad_()
        read = call(q, b, **chosen)
        results.append((read.detach(), *torch.autograd.grad(read, (q, b), upstream.to(read.dtype))))
    for got, expected in zip(*results, strict=True):
        assert got.dtype == query.dtype
        assert_near(got, expected, tolerance)
