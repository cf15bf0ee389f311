"""gumbel_topk beside plain torch: product, Gumbel noise by ``torch.rand``, ``topk``, gather and sum.

The peers draw their noise from torch's generator, so with noise their error is not comparable (nan); without noise all
compute the same. The limit is that of the product alone: what would be left if noise and selection cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from harness import Case, Provider, compiled, each_provider, eager, ours, with_gradient
from torch import Tensor

import memad_fast
from memad_fast.ops.gumbel_topk import reference

SEED = 7


def plain_forms(k: int, noise: bool, combine: str) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """The op as it is written in plain torch; the noise in the −log(−log u) form of the published code."""

    def form(query: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = query @ memory.T
        if noise:
            logits = logits - torch.log(-torch.log(torch.rand_like(logits).clamp_min(1e-20)))
        scores, indices = logits.topk(k, dim=1)
        if combine == "sum":
            return memory[indices].sum(dim=1), indices, scores
        soft = logits.softmax(dim=1)
        hard = torch.zeros_like(soft).scatter(1, indices, soft.gather(1, indices))
        hard = hard / hard.sum(dim=1, keepdim=True)
        return ((hard - soft).detach() + soft) @ memory, indices, scores

    return form


def largest_read_error(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Of the read, over its largest magnitude, in rows whose choice is that of float64 (float32 swaps near-ties)."""
    same = (got[1] == expected[1]).all(dim=1)
    if same.float().mean() < 0.9:  # another draw of the noise
        return float("nan")
    difference = (got[0].double() - expected[0].double())[same].abs().max()
    return float(difference / expected[0].double().abs().max())


def cases(n: int, m: int, d: int, k: int) -> list[Case]:
    def case(name: str, noise: bool, combine: str, gradient: bool = False, target: float | None = None) -> Case:
        def op(query: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return memad_fast.gumbel_topk(query, memory, k, seed=SEED, noise=noise, combine=combine)

        def expected(query: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            seed = torch.tensor(SEED) if noise else None
            return reference(query.double(), memory.double(), k, 1.0, seed, combine)

        form = plain_forms(k, noise, combine)
        providers: list[Provider] = [ours(op), eager("eager", form), compiled("eager", form)]
        if gradient:
            providers = [with_gradient(provider) for provider in providers]
        return Case(
            f"{n}x{m}x{d} k={k} {name}",
            inputs=lambda: (torch.randn(n, d), torch.randn(m, d)),
            providers=providers,
            expected=expected,
            # Of ours; nan fails it. Scores reach 4·√d, and the softmax hands their rounding (ulp 8e-6 at 100) to the
            # weights: no float32 form is closer.
            tolerance=1e-4 if combine == "straight_through" else 1e-5,
            flops=2.0 * n * m * d,
            bytes=4 * (2 * n * d + m * d + 3 * n * k),
            target=target,
            error=largest_read_error,
        )

    target = {(1_024, 1_024): 3.0, (16_384, 256): 4.0, (4_096, 4_096): 3.0}.get((n, m))
    return [
        case("noise, sum", True, "sum", target=target),
        case("deterministic, sum", False, "sum"),
        case("straight-through, forward+backward", False, "straight_through", gradient=True),
    ]


CASES = [
    *cases(1_024, 1_024, 64, 5),
    *cases(16_384, 256, 64, 5),
    *cases(4_096, 4_096, 512, 8),
    *cases(16, 100_000, 64, 5)[:2],  # too few rows for the threads: the columns are shared out
]


@each_provider(CASES)
def bench_gumbel_topk(measure: Callable, case: Case, provider: Provider) -> None:
    measure(case, provider)
