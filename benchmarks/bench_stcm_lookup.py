"""stcm_lookup beside plain torch: nearest key and its value, for one MemSTC-Net image and batches of 8 and 32.

Every row reads a 512-value texture beside its 512-value structure. The peers find the key in float32; their reads are
checked against float64 like ours, which must name the float64 key.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from bench_nearest_keys import cdist_argmin, float64_search, wrong_indices
from harness import Case, Provider, compiled, each_provider, eager, ours
from torch import Tensor

import memad_fast


def gathered(query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    distances, indices = cdist_argmin(query, keys)
    return values[indices[:, 0]], distances[:, 0], indices[:, 0]


def product_gathered(query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scores, indices = torch.addmm(keys.square().sum(dim=1) / 2, query, keys.T, alpha=-1.0).min(dim=1)
    return values[indices], 2.0 * scores + query.square().sum(dim=1), indices


def expected(query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    distances, indices = float64_search(query, keys)
    return values[indices[:, 0]], distances[:, 0], indices[:, 0]


def wrong_reads(got: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> float:
    """Share of rows whose index or value is not the float64 one."""
    wrong = (got[2] != exact[2]) | (got[0] != exact[0]).any(dim=1)
    return max(float(wrong.double().mean()), wrong_indices((None, got[2]), (None, exact[2])))


def case(count: int) -> Case:
    slots, dim = 2048, 512
    return Case(
        f"{count}x{slots}x{dim}",
        inputs=lambda: (torch.randn(count, dim), torch.randn(slots, dim), torch.randn(slots, dim)),
        providers=[
            ours(memad_fast.stcm_lookup),
            eager("cdist+argmin+gather", gathered),
            eager("mm+argmin+gather", product_gathered),
            compiled("mm+argmin+gather", product_gathered),
        ],
        expected=expected,
        tolerance=0.0,
        error=wrong_reads,
        flops=2.0 * count * slots * dim,
        bytes=4.0 * (2 * count + slots) * dim,
    )


@each_provider([case(196), case(1568), case(6272)])
def bench_stcm_lookup(measure: Callable, case: Case, provider: Provider) -> None:
    measure(case, provider)
