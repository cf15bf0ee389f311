"""What may differ in a choice of the largest scores, as assertions, for the tests of gumbel_topk on every device."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from carried import on
from torch import Tensor

import memad_fast
from memad_fast._noise import gumbel_noise
from memad_fast.ops.gumbel_topk import reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPSILON = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def rows(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


def score_band(query: Tensor, memory: Tensor, unit: float, largest_noise: float = 17.0) -> Tensor:
    """Per query row, a bound on the error of a float32 score: any order of summation, plus adding the noise.

    |computed − exact| ≤ γ_D Σ|q||m| + u(|score| + noise), with γ_D = D·u / (1 − D·u) (Higham, section 3.1).
    """
    gamma = (query.shape[1] + 1) * unit / (1 - (query.shape[1] + 1) * unit)
    products = query.double().abs() @ memory.double().abs().T
    if products.shape[1] == 0:
        return query.new_zeros(query.shape[0], 1, dtype=torch.float64)
    return (gamma * products + unit * (products + largest_noise)).amax(dim=1, keepdim=True)


def assert_same_choice(indices: Tensor, exact_scores: Tensor, band: Tensor) -> None:
    """``indices`` are the top-k of ``exact_scores`` in order, but for swaps of scores that lie within 2·band.

    Outside the band two float32 scores compare as the exact ones do, so there no other answer is accepted.
    """
    k = indices.shape[1]
    ranked, order = exact_scores.sort(dim=1, descending=True, stable=True)
    assert bool((indices.sort(dim=1).values.diff(dim=1) > 0).all()), "an index occurs twice"
    got = exact_scores.gather(1, indices)
    assert bool(((got == ranked[:, :k]) | ((got - ranked[:, :k]).abs() <= 2 * band)).all())
    clear = torch.ones_like(got, dtype=torch.bool)
    gaps = ranked[:, :-1] - ranked[:, 1:] > 2 * band  # rank r is clearly above rank r + 1
    clear[:, 1:] &= gaps[:, : k - 1]
    clear[:, : gaps.shape[1]] &= gaps[:, :k]
    assert bool((indices == order[:, :k])[clear].all())


def call_reference(
    query: Tensor, memory: Tensor, k: int, seed: int | None, temperature: float, combine: str
) -> tuple[Tensor, Tensor, Tensor]:
    key = None if seed is None else torch.tensor(seed)
    return reference(query.double(), memory.double(), k, temperature, key, combine)


def exact_scores(query: Tensor, memory: Tensor, seed: int | None) -> Tensor:
    scores = query.double() @ memory.double().T
    return scores if seed is None else scores + gumbel_noise(torch.tensor(seed), *scores.shape)


def assert_matches_reference(
    query: Tensor,
    memory: Tensor,
    k: int,
    combine: str,
    *,
    seed: int | None = 11,
    temperature: float = 1.0,
    device: str = "cpu",
    unit: float = 2.0**-24,
) -> None:
    """The choice, the scores and the read are those of float64 but for float32 sums, of rounding error ``unit``."""
    read, indices, scores = on(device, memad_fast.gumbel_topk)(
        query, memory, k, temperature=temperature, seed=seed, noise=seed is not None, combine=combine
    )
    assert read.dtype == query.dtype
    assert scores.dtype == torch.float32
    band = score_band(query, memory, unit)
    exact = exact_scores(query, memory, seed)
    assert_same_choice(indices, exact, band)
    assert bool(((scores.double() - exact.gather(1, indices)).abs() <= band).all())
    assert bool((scores.diff(dim=1) <= 0).all())
    # The weights, from the indices that came: a swap inside the band must not blur what is asserted of the read.
    picked = exact.gather(1, indices) / temperature
    if combine in ("sum", "mean"):
        weights = torch.full_like(picked, 1.0 if combine == "sum" else 1.0 / k)
    elif combine == "softmax":
        weights = torch.exp(picked - torch.logsumexp(exact / temperature, dim=1, keepdim=True))
    else:
        weights = torch.softmax(picked, dim=1)
    chosen = memory.double()[indices]
    expected = (weights[..., None] * chosen).sum(dim=1)
    size = (weights[..., None] * chosen.abs()).sum(dim=1)
    relative = EPSILON[query.dtype] + (k + 60) * EPSILON[torch.float32] + 2 * band / temperature
    assert bool(((read.double() - expected).abs() <= relative * size + 1e-30).all())


def gradients(
    call: Callable[..., tuple[Tensor, ...]], query: Tensor, memory: Tensor, grads: tuple[Tensor, Tensor]
) -> list[Tensor]:
    """Of Σ read·grads[0] + Σ scores·grads[1], for query and memory."""
    inputs = query.detach().requires_grad_(), memory.detach().requires_grad_()
    read, _, scores = call(*inputs)
    total = (read.double() * grads[0]).sum() + (scores.double() * grads[1]).sum()
    return [grad.double() for grad in torch.autograd.grad(total, inputs)]


def assert_gradients_match(query: Tensor, memory: Tensor, combine: str, device: str = "cpu") -> None:
    grads = (torch.randn(query.shape).to(query.dtype).double(), torch.randn(len(query), 5).double())
    op = partial(memad_fast.gumbel_topk, k=5, seed=21, combine=combine, temperature=1.3)
    exact = partial(reference, k=5, seed=torch.tensor(21), combine=combine, temperature=1.3)
    got = gradients(on(device, op), query, memory, grads)
    expected = gradients(exact, query.double(), memory.double(), grads)
    for a, b in zip(got, expected, strict=True):
        tolerance = 4 * EPSILON[query.dtype] if query.dtype != torch.float32 else 5e-6
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())
